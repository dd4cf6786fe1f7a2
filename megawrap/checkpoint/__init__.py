"""Checkpoints: `store` commits, verifies and keeps directories, `state` says what is in one, `torch_dist` reads and
writes their bytes, `untrusted` opens pickled files without running them. `store` needs no torch.
"""
