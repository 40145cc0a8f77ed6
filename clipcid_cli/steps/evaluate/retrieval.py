"""Zero-shot retrieval between images and captions: from embeddings to recall at k."""

from __future__ import annotations

import torch

from clipcid_cli.algorithms.metrics.retrieval import RECALL_AT, recall_metrics, retrieval_ranks
from clipcid_cli.formats.results import predictions
from clipcid_cli.steps.evaluate.task_result import TaskEmbeddings, TaskResult
from clipcid_cli.steps.reporting import Reporter


def measure_retrieval(embeddings: TaskEmbeddings, device: torch.device, reporter: Reporter) -> TaskResult:
    """Measure recall at k of images from captions, and of captions from images.

    Args:
        device: Where similarities are computed.
    """
    task, batches = embeddings.task, embeddings.batches
    images = torch.cat([batch.images for batch in batches]).to(device)
    texts = torch.cat([batch.texts for batch in batches if batch.texts is not None]).to(device)
    captions = torch.tensor([number for batch in batches for number in batch.captions_per_image])
    image_of_text = torch.repeat_interleave(torch.arange(len(images)), captions)
    smallest = min(len(images), len(texts))
    if smallest <= max(RECALL_AT):
        reporter.note(
            f"{task.name}: with {len(images)} images and {len(texts)} captions, recall at {smallest} or more means little."
        )
    image_ranks, text_ranks = (ranks.cpu() for ranks in retrieval_ranks(images, texts, image_of_text.to(device)))
    metrics = recall_metrics((image_ranks, text_ranks), image_of_text)
    kept = None
    if embeddings.keep_predictions:
        columns = {
            "image_ranks": [part.tolist() for part in torch.split(image_ranks, captions.tolist())],
            "text_rank": text_ranks.numpy(),
        }
        kept = embeddings.make_predictions(predictions.RETRIEVAL, columns)
    return TaskResult(
        metrics=metrics.values(),
        intervals=metrics.intervals(embeddings.replicates, embeddings.seed),
        per_class=[],
        examples=[],
        predictions=kept,
        texts=len(texts),
    )
