"""A²MC skeleton pretraining on one GPU: recordings in, a pretrained encoder out.

Nothing is imported here, so that ``python -m a2mc_fast.train --help`` is instant; import from the modules.
"""

__version__ = "0.1.0"
