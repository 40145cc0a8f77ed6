"""Seeds and shares of keys depend on their arguments only."""

from clipcid_cli.runtime.randomness import derive_seed, key_fraction, key_fractions


def test_seeds_are_the_same_on_every_machine() -> None:
    # Written down once: a change of these numbers changes every user's sample order and hold-out.
    assert derive_seed("epoch", 0, 1) == 5429471261494044530
    assert round(key_fraction("000000001"), 12) == 0.766953541088
    assert derive_seed("a", "bc") != derive_seed("ab", "c")


def test_a_share_of_keys_is_held_out() -> None:
    held = sum(key_fraction(f"{number:09d}") < 0.01 for number in range(100_000))
    assert 900 < held < 1100


def test_shares_of_many_keys_are_those_of_each() -> None:
    keys = [f"é{number}" for number in range(1_000)]
    assert key_fractions(keys).tolist() == [key_fraction(key) for key in keys]
    assert key_fractions([]).tolist() == []
