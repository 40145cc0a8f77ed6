"""What embedding everything once is compared with."""

from clipcid_cli.steps.distill.cost import passes_to_embed


def test_views_count_as_images_and_captions_and_variants_as_texts() -> None:
    assert passes_to_embed(9.0, 1.0, 0, 1) == 1
    assert passes_to_embed(9.0, 1.0, 2, 1) == (3 * 9 + 1) / 10
    assert passes_to_embed(9.0, 1.0, 2, 9) == (3 * 9 + 9 * 1) / 10
