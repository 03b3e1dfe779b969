"""Fine-tuning: from a dataset and a model to an adapter in service that is known to be better.

A request writes what is wanted (`actions`): a `Finetune` row and its FT job. The job's function (`trainings`) brings
the data, waits for its turn at the accelerator (`accelerator`; how much it `needs`, and who is to `stand_aside`), runs
the trainer child, keeps its checkpoints in the storage (`checkpoints`), puts the adapter into the store (`publishing`)
and into the storage (`backups`), and, where that is asked for, into service (`into_service`). Only that function writes
what is: phase, figures, points.

Before a training `planning` says what it would take: the trainer runs an errand that a request waits for (`errands`).
"""
