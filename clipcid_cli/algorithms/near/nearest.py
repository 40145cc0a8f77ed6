"""The nearest of many rows for each row: one by products of small integers, several by products in float32.

**One** is what each iteration of k-means asks for. Rows and centroids are rounded to integers; a row has a step of its own,
all centroids share one, so neither step decides which product is the largest. Integers of at most √(2²⁴/D) make products
whose sums are exact in any order, in int32 as in float32: what is nearest depends on neither formats, devices, threads nor
processes. On three sets of real embeddings k-means with rounded products ended within 0.15 % of the mean similarity that it
reaches with float32 products, as often above it as below (20 iterations, 16 to 700 clusters). An int8 product and its
largest entries take a ninth of the time of a float32 product (AVX-512 VNNI, widths 192 to 768).

**Several** is what is stored of each row, and what partitions and nearest-neighbour classifiers ask for. On a CPU faiss
finds them. Similarities are float32 sums, whose last digit depends on the machine: of nearly equal ones another may come
first elsewhere. A block of the same rows gives the same bytes on one machine, so callers cut rows into blocks that do not
depend on processes.

Neighbours are numbered from 0 to K − 1; of equally similar ones the smaller number comes first.
"""

from __future__ import annotations

import dataclasses
import math
import os

import torch

from clipcid_cli.algorithms.accumulation import exact_accumulation
from clipcid_cli.algorithms.near.block import multiply, score_dtype
from clipcid_cli.algorithms.near.exact import ROWS_IN_CACHE

# Rows and centroids of one product: on a CPU its scores stay near the caches, a GPU needs more work at a time.
_PRODUCT_ROWS = {"cpu": 1024, "cuda": 16_384}
_PRODUCT_CENTROIDS = {"cpu": 4096, "cuda": 16_384}
_LARGEST_INT8 = 127
_BELOW_ALL = -(2**25)


@dataclasses.dataclass(frozen=True)
class Integers:
    """Rows as integers, in a format whose products are fast and exact, times a step each."""

    values_ND: torch.Tensor  # whole numbers; int8, float16 or float32
    step_N1: torch.Tensor  # float32 [N, 1], or [1, 1] where all rows share a step

    @classmethod
    def from_rows(cls, rows_ND: torch.Tensor, dtype: torch.dtype, *, one_step: bool = False) -> Integers:
        """Round rows, float16 or float32 [N, D].

        Args:
            dtype: Format of fast products on this device, which tells whether int8 is fast; it changes no answer.
            one_step: Whether all rows share one step.
        """
        parts = torch.split(rows_ND, ROWS_IN_CACHE)
        largest_N1 = torch.cat([part.abs().amax(dim=1, keepdim=True).float() for part in parts])
        if one_step:
            largest_N1 = largest_N1.amax(dim=0, keepdim=True)
        limit = min(_LARGEST_INT8, math.isqrt(2**24 // rows_ND.shape[1]))
        # A GPU multiplies by the reciprocal of a number, but divides by a tensor, rounding once.
        step_N1 = (largest_N1 / torch.full_like(largest_N1, limit)).clamp(min=torch.finfo(torch.float32).tiny)
        steps = [step_N1] * len(parts) if one_step else torch.split(step_N1, ROWS_IN_CACHE)
        kept_as = integer_dtype(rows_ND.device, dtype, rows_ND.shape[1])
        rounded = [(part.float() / step).round_().to(kept_as) for part, step in zip(parts, steps, strict=True)]
        return cls(torch.cat(rounded), step_N1)

    def __len__(self) -> int:
        return len(self.values_ND)

    @property
    def num_bytes(self) -> int:
        return self.values_ND.nbytes + self.step_N1.nbytes


def integer_dtype(device: torch.device, dtype: torch.dtype, width: int) -> torch.dtype:
    """Return the format that `Integers` keeps rows of a width in, given the format of fast products on the device."""
    if device.type == "cuda":
        return torch.float16
    # PyTorch 2.13 fails at int8 products of one column.
    return torch.int8 if dtype != torch.float32 and width > 1 else torch.float32


def nearest(rows: Integers, centroids: Integers) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the nearest centroid of each row; several threads may call it at once.

    Returns:
        Its number, int64 [N], and the similarity but for rounding to integers, float64 [N].
    """
    device = rows.values_ND.device
    size, centroids_at_once = _PRODUCT_ROWS[device.type], _PRODUCT_CENTROIDS[device.type]
    # Fresh memory for each product would take as long as the product.
    room = min(size, len(rows)) * min(centroids_at_once, len(centroids))
    buffer = torch.empty(room, dtype=score_dtype(rows.values_ND.dtype)) if device.type == "cpu" else None
    numbers = list[torch.Tensor]()
    scores = list[torch.Tensor]()
    for rows_BD in torch.split(rows.values_ND, size):
        score_B = torch.full((len(rows_BD),), _BELOW_ALL, dtype=torch.int64, device=device)
        number_B = torch.zeros_like(score_B)
        for index, part_CD in enumerate(torch.split(centroids.values_ND, centroids_at_once)):
            place_B, largest_B = _largest(_multiply(rows_BD, part_CD, buffer))
            number_B = torch.where(largest_B > score_B, place_B + index * centroids_at_once, number_B)
            score_B = torch.maximum(score_B, largest_B)
        numbers.append(number_B)
        scores.append(score_B)
    similarity_N = torch.cat(scores).double() * rows.step_N1[:, 0].double() * centroids.step_N1[:, 0].double()
    return torch.cat(numbers), similarity_N


def bytes_of_products(device: torch.device, num_rows: int, num_centroids: int) -> int:
    """Return the bytes of the products that `nearest` holds at once; they have four bytes on every device."""
    return 4 * min(num_rows, _PRODUCT_ROWS[device.type]) * min(num_centroids, _PRODUCT_CENTROIDS[device.type])


def _multiply(a_BD: torch.Tensor, b_CD: torch.Tensor, buffer: torch.Tensor | None) -> torch.Tensor:
    """Return the products of integers: int32, or whole numbers in float32."""
    if a_BD.dtype != torch.float16:
        return multiply(a_BD, b_CD, buffer)
    with exact_accumulation(a_BD.device):
        return torch.mm(a_BD, b_CD.T, out_dtype=torch.float32)


def _largest(score_BC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where each row is largest, the first place of equal ones, and how large, int64 [B] both."""
    is_on_cpu = score_BC.device.type == "cpu"
    # NumPy's takes an eighth of the time of PyTorch's.
    place_B = torch.from_numpy(score_BC.numpy().argmax(axis=1)) if is_on_cpu else score_BC.argmax(dim=1)
    return place_B, score_BC.gather(1, place_B[:, None])[:, 0].long()


def top(rows_BD: torch.Tensor, centroids_KD: torch.Tensor, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the `m` nearest centroids of each row, the most similar first; several threads may call it at once.

    Args:
        rows_BD: Unit rows, float16 or float32, on the device of the centroids.
        m: Centroids per row, in [1, K].

    Returns:
        Their numbers, int64 [B, m], and their similarities, float32 [B, m].
    """
    find = _top_by_faiss if rows_BD.device.type == "cpu" else _top_by_torch
    similarity_Bm, number_Bm = find(rows_BD.float(), centroids_KD, m)
    number_Bm, order_Bm = number_Bm.sort(dim=1)
    similarity_Bm, place_Bm = similarity_Bm.gather(1, order_Bm).sort(dim=1, descending=True, stable=True)
    return number_Bm.gather(1, place_Bm), similarity_Bm


def _top_by_faiss(rows_BD: torch.Tensor, centroids_KD: torch.Tensor, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        # On processors it does not know, faiss's OpenBLAS takes kernels that need twice as long (AMD EPYC, width 192).
        os.environ.setdefault("OPENBLAS_CORETYPE", "SkylakeX")
    import faiss  # here alone: half a second

    faiss.omp_set_num_threads(torch.get_num_threads())  # of this thread; faiss has an OpenMP of its own
    similarity_Bm, number_Bm = faiss.knn(rows_BD.numpy(), centroids_KD.numpy(), m, metric=faiss.METRIC_INNER_PRODUCT)
    return torch.from_numpy(similarity_Bm), torch.from_numpy(number_Bm)


def _top_by_torch(rows_BD: torch.Tensor, centroids_KD: torch.Tensor, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    similarity_Bm, number_Bm = rows_BD[:, :0], rows_BD[:, :0].long()
    first = 0
    for part_CD in torch.split(centroids_KD, _PRODUCT_CENTROIDS[rows_BD.device.type]):
        with exact_accumulation(rows_BD.device):
            score_BC = rows_BD @ part_CD.T
        part_Bm, place_Bm = score_BC.topk(min(m, len(part_CD)), dim=1)
        both_Bm = torch.cat([similarity_Bm, part_Bm], dim=1)
        numbers_Bm = torch.cat([number_Bm, place_Bm + first], dim=1)
        similarity_Bm, place_Bm = both_Bm.topk(min(m, both_Bm.shape[1]), dim=1)
        number_Bm = numbers_Bm.gather(1, place_Bm)
        first += len(part_CD)
    return similarity_Bm, number_Bm
