"""The trainer: a child that fine-tunes a LoRA adapter and says how it goes; `python -m modelyard.trainer SPEC`.

The server imports `spec`, the file between it and the child, `model_files`, and what it refuses itself by the files
(`refusals`, in the trainer's words, and `layer_names`). Everything else runs in the child, on torch, transformers and
PEFT, with the hub offline and without a secret: it reads a dataset's file and a model's folder, and writes into folders
that the server gave it.

- what is learnt: `rendering` (a conversation as text, and what of it is learnt) of `engine_messages`, by `completions`
  (what follows on a prompt) and `content_format` (contents as text, or in parts); `labels` (the same as tokens),
  `messages`, `rows` (which rows, as `examples`), `held_back` (which of them are not learnt), `preparation` (all of that
  at once), `default_template` (for models without one), `text_parts` (several texts of one message), `texts` (rows that
  are one text), `tokenizer_trial` (whether the tokenizer can be used at all) and `row_trial` (which rows train),
  both in children with limits of their own
- how: `choices` (settings that were left open), `model` (the base and its adapter), `layers` (which of its layers have
  one), `batches` (which rows when), `packing` (whether several may share a line), `sizing` (how many in a forward
  pass), `loop` (the training) by `stepping` (inside transformers' Trainer), `curve` (what it measured), `checkpoints`
  (whole or not there), `memory` (what there is), `ranks` (several processes that share it, which `launcher` starts)
- what it would take: `plan` (a dry run), by `trial` (a few steps, measured), and by `forecast` early in the training
- what came of it: `evaluation` (base and adapter on held-out rows) by its `scores`, `merge` (an adapter in its base)
- to the server: `reports` (progress, as lines), `failures` (why it did not work, and what to do)
"""
