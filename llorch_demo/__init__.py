"""The bundled demo model: a Hugging Face model folder inside the package, and nothing else.

``MODEL_DIR`` is loaded exactly as any downloaded folder is; ``tools/train_demo_model.py`` makes it.
"""

from pathlib import Path

MODEL_DIR: Path = Path(__file__).resolve().parent / "model"

__all__ = ["MODEL_DIR"]
