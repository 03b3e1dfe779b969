"""Models: what is in the store, and how it gets in and out.

A row stands for a model or an adapter whose folder is whole, verified and scanned; nothing else is ever in a row.
A request writes the wish for a DOWNLOAD job; the job runs `download_child`, which alone speaks to the hub, writes
beside, and moves the folder into place; then the job writes the row. `scan` says what is refused and why.

- from elsewhere: `listing` (a hub's answer, checked), `file_names` (which names may become paths), `selection` (which
  files are fetched), `fetched` (each file scanned as it arrives), `shards` (whether the weights are whole)
- from a model's files: `config_file` (the one reader of config.json), `mistral_format`, `references` (keys that load
  code or other repositories), `kinds` by `architectures` (is it served), `chat_template`, `tokenizer_child`
  An adapter's are read once (`adapter_facts`) and kept in its row (`stored_adapters`), and held against its base's
  layers (`adapter_checks`, `base_layers`); what it carries otherwise than its base is said (`adapter_rendering`)
- for trainings: `trainable` (can an adapter be trained for it), by `causal_models`
- afterwards: `lost` (a folder that is gone), `rescan` (the configuration by the rules of today, before each start)

Engines and trainers read the folders; who deploys what is not known here.
"""
