"""One CPU thread for all tests and the processes that they start.

On the small tensors here a second thread gains little, and on a busy machine it costs a multiple.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported

import torch

torch.set_num_threads(1)
