"""Tests of icl_helpers. None of them needs the hub."""

import os

# Before the hub's libraries are imported: they read it then.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
