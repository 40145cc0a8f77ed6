"""Embed in parts on a Ray cluster, a task for each; one whose machine is lost runs elsewhere, and continues.

python recipes/anywhere/ray_parts.py 8 laion/ --model ViT-L-14 --out s3://bucket/laion-emb
"""

import subprocess
import sys

import ray


@ray.remote(max_retries=10)
def embed(part: str, words: list[str]) -> None:
    """Embed a part, in a process of its own."""
    subprocess.run([sys.executable, "-m", "clipcid_cli", "embed", *words, "--part", part], check=True)


def main() -> None:
    """Run all parts, on a GPU each where the cluster has any; the first error is this program's."""
    count, *words = sys.argv[1:]
    ray.init()
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    parts = [f"{index}/{count}" for index in range(int(count))]
    ray.get([embed.options(num_gpus=gpus).remote(part, words) for part in parts])


if __name__ == "__main__":
    main()
