"""Tests of exports share the tiny Llama of the trainings."""

from __future__ import annotations

from tests.finetune.conftest import imports as imports
from tests.finetune.conftest import llama as llama
