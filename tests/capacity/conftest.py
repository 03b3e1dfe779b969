"""Tests of the capacity room share the tiny Llama with those of trainings."""

from tests.finetune.conftest import llama as llama
