"""The decision to start a deployment's engine, and its command: the fit check on what others hold.

Reads the machine, the model's files and the tables. The supervisor holds a lock from `room` until the engine's memory
is reserved, so that two engines never count on the same memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from pathlib import Path
from uuid import UUID

from modelyard.capacity import reservations
from modelyard.capacity.ledger import Allocation, Ledger, on_gpus, on_main_memory
from modelyard.capacity.tables import MAIN_MEMORY, ONE_SHOT, Kind
from modelyard.db import Sessions
from modelyard.deploy import actions, succession
from modelyard.deploy.steps import Room
from modelyard.deploy.tables import LIVE, Deployment, Strategy, Wanted
from modelyard.engine.command import AdapterFiles, engine_command
from modelyard.engine.memory import Fit, fit
from modelyard.engine.model_files import model_files, servable_files
from modelyard.engine.options import EngineOptions
from modelyard.errors import JobFailure, Unprocessable
from modelyard.hardware import CUDA_DEVICES, Machine, this_machine
from modelyard.models import store
from modelyard.models.adapter_checks import check_facts
from modelyard.models.chat_template import TemplateSource, source_of
from modelyard.models.stored_adapters import StoredAdapter, with_facts
from modelyard.models.tables import Model
from modelyard.models.tokenizer_child import TokenizerChildren
from modelyard.processes import Child, Command
from modelyard.settings import Settings
from modelyard.trainer.model_files import BOS, PLAIN_TEMPLATE

#: Runs of other rooms for which engines leave memory free.
OTHER_KINDS = (Kind.TRAINING, *ONE_SHOT)


class Fitting:
    """Looks whether there is room. `message` says the numbers of the last look."""

    def __init__(self, settings: Settings, sessions: Sessions) -> None:
        self._settings = settings
        self._sessions = sessions
        self.message = ""
        #: What renders the chats of the model that the last command was for; None for one that has none.
        self.template_source: TemplateSource | None = None
        #: By a model's folder: the chat template that it gets if it has none.
        self._templates: dict[Path, str] = {}

    async def room(self, row: Deployment) -> Room:
        """Return whether the deployment's engine may start.

        Raises:
            JobFailure: the model's or an adapter's files cannot be read or served.
        """
        async with self._sessions.read() as session:
            live = await succession.live(session)
            replaced = await succession.replaced_by(session, row)
            model, rows = await actions.model_rows(session, row)
            ledger = await reservations.ledger(session, self._settings.engine_memory_gib)
        if row.strategy == Strategy.REPLACE and any(one.state in LIVE and one.wanted != Wanted.UP for one in replaced):
            return Room.COMING
        adapters = await with_facts(self._sessions, self._settings.models_dir, rows)
        now = await asyncio.to_thread(this_machine)

        async def fits(gone: Collection[UUID] = ()) -> Fit:
            machine = ledger.left(now, but=[row.id], gone=gone)
            return await asyncio.to_thread(self.fit, row, model, adapters, machine)

        found = await fits()
        self.message = f"{found.message} {in_words(ledger)}".rstrip()
        if found.fits and not is_blind(ledger, now, row.id):
            return Room.THERE
        if any(one.wanted != Wanted.UP and one.id != row.id for one in live):
            return Room.COMING
        if (short := ledger.runs(ONE_SHOT)) and (await fits(short)).fits:
            return Room.COMING  # a request waits for those: they end soon
        staying = {one.id for one in replaced if one.wanted == Wanted.UP and one.state in LIVE}
        if staying and row.strategy == Strategy.AUTO and (await fits(staying)).fits:
            return Room.TO_BE_MADE
        if row.has_served:
            return Room.COMING  # it has served before: what lacks is not the model's fault, and may come back
        # Nobody leaves for what then cannot start all the same: the command refuses it, with the numbers.
        return Room.THERE

    async def try_tokenizer(self, row: Deployment, tokenizers: TokenizerChildren) -> None:
        """Load and use the model's tokenizer in a child with limits, once: an engine has none, and would stall or die.

        Raises:
            JobFailure: `bad_tokenizer` or `no_process`.
        """
        async with self._sessions.read() as session:
            model, _ = await actions.model_rows(session, row)
        folder = store.folder_of(self._settings.models_dir, model.path)
        if folder not in self._templates:
            template = await tokenizers.tried(model.model_id, folder)
            self._templates[folder] = PLAIN_TEMPLATE.replace(BOS, "") if template is None else template

    async def command(self, row: Deployment, python: Path, scratch: Path) -> tuple[Command, Allocation]:
        """Return the engine's command, and the memory that it gets. `try_tokenizer` comes before.

        Raises:
            JobFailure: it does not fit, or the files cannot be read or served.
        """
        async with self._sessions.read() as session:
            model, rows = await actions.model_rows(session, row)
            ledger = await reservations.ledger(session, self._settings.engine_memory_gib)
        adapters = await with_facts(self._sessions, self._settings.models_dir, rows)

        def make() -> tuple[Command, Allocation]:
            machine = ledger.left(this_machine(), but=[row.id])
            files, adapter_files = servable_files(self._settings, model), self._adapter_files(model, adapters)
            options = EngineOptions(**row.options).over(self._settings)
            cache = self._settings.data_dir / "cache"
            source = None
            if files.task == "generate":
                source = source_of(files.path, has_mistral_tokenizer=files.has_mistral_tokenizer)
            self.template_source = source
            # Adapters are trained with the same one.
            template = self._templates[files.path] if source == TemplateSource.GUESSED else None
            try:
                command = engine_command(python, files, adapter_files, options, machine, scratch, cache, template)
            except JobFailure as failure:
                if failure.code == "not_enough_memory" and in_words(ledger):
                    failure.message = f"{failure.message} {in_words(ledger)}"
                    failure.hint = f"Wait for it to end. {failure.hint}"
                raise
            return command, allocation(self.fit(row, model, adapters, machine), machine)

        return await asyncio.to_thread(make)

    def fit(self, row: Deployment, model: Model, adapters: Sequence[StoredAdapter], machine: Machine) -> Fit:
        """Return what the deployment's engine takes of a machine. Blocks.

        Raises:
            JobFailure: the model's or an adapter's files cannot be read or served.
        """
        rank = max((one.rank for one in self._adapter_files(model, adapters)), default=0)
        options = EngineOptions(**row.options).over(self._settings)
        return fit(servable_files(self._settings, model), options, machine, rank)

    def held_by_engine(self, child: Child, row: Deployment) -> Allocation | None:
        """Return what a running engine holds, where the ledger does not tell of which GPUs; None where it does. Blocks.

        The version before this one did not write them down: the engine's own environment tells.
        """
        if {one.device for one in row.reservations} != {MAIN_MEMORY} or not this_machine().has_gpu:
            return None
        indexes = [int(one) for one in (child.variable(CUDA_DEVICES) or "").split(",") if one.isdecimal()]
        return on_gpus(indexes, (row.memory_bytes or 0) // max(1, len(indexes)))

    def _adapter_files(self, model: Model, adapters: Sequence[StoredAdapter]) -> list[AdapterFiles]:
        files = model_files(self._settings, model)
        for one in adapters:
            try:
                check_facts(one.facts, files.config, adapter_id=one.adapter_id, base_folder=files.path)
            except Unprocessable as error:
                raise JobFailure(error.code, error.message, "Deploy without it.") from error
        return [AdapterFiles(one.adapter_id, one.path, one.facts.rank, one.facts.size_bytes) for one in adapters]


def allocation(found: Fit, machine: Machine) -> Allocation:
    """Return the memory that an engine takes by the fit, device by device."""
    if not machine.has_gpu:
        return on_main_memory(found.total_bytes)
    return Allocation(found.gpus) if found.gpus else on_gpus((), found.total_bytes)


def is_blind(ledger: Ledger, machine: Machine, *but: UUID, gone: Collection[UUID] = ()) -> bool:
    """True if nothing tells how much memory the GPUs have, and another run is on them: one at a time is safe."""
    return machine.has_gpu and not machine.gpus and bool(ledger.on_accelerator(machine, but=[*but, *gone]))


def in_words(ledger: Ledger) -> str:
    """Return to which trainings, plans and merges how much is promised, as a sentence; empty if nothing is."""
    return ledger.in_words(OTHER_KINDS)
