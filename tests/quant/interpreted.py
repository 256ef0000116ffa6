"""Triton's kernels, as modules made anew: for its interpreter, or for GPUs' compilers."""

import importlib
import sys

import pytest


def fixtures(*names):
    """Two fixtures that give the module of the first name: interpreted, and to be compiled. The
    others are those that it takes kernels from; all are forgotten afterwards.
    """

    def fresh(monkeypatch, interpret):
        monkeypatch.setenv("TRITON_INTERPRET", interpret)  # looked at when a kernel is defined
        for name in names:
            monkeypatch.delitem(sys.modules, name, raising=False)
        yield importlib.import_module(names[0])
        for name in names:
            sys.modules.pop(name)

    @pytest.fixture
    def kernels(monkeypatch):
        yield from fresh(monkeypatch, "1")

    @pytest.fixture
    def for_gpus(monkeypatch, tmp_path):
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        yield from fresh(monkeypatch, "0")

    return kernels, for_gpus


def builder(gpu):
    """tests/quant/built.py, which needs triton; skips where that has no compiler for such GPUs."""
    from triton.backends import backends

    if {"cuda": "nvidia", "hip": "amd"}[gpu[0]] not in backends:
        pytest.skip("this Triton has no compiler for such GPUs")
    return importlib.import_module("fewstep.tests.quant.built")
