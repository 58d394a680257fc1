"""The vision-language-action policy: interface, model and decoding. May import `quant`; knows no simulator."""

import os

# OpenMP's threads spin while they wait for one another. Beside another busy process, a simulator say, the one that is
# waited for then gets no processor, and a step of the model takes up to fifty times as long. Read when torch is loaded.
# Threads that sleep instead tend to wake on the core of whoever wakes them, so that a small model gains nothing by a
# second one: on cores that are free, "active" is a quarter faster.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
