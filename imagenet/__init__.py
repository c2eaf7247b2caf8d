"""Full ImageNet DiT distillation and evaluation; see README.md in this folder."""
