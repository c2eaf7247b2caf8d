"""One CPU thread and no Hub, for all tests and the processes that they start.

On the small tensors here a second thread gains little, and on a busy machine it costs a multiple.
No test downloads: without a network each attempt would be repeated for a while.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported
os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import torch

torch.set_num_threads(1)
