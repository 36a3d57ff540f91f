"""The event-driven training loop, exact resume and checkpoints of crosstrain."""

if __name__ != "crosstrain.engine":
    raise ImportError(
        "crosstrain's engine was imported as 'engine'. Install the project (pip install -e .) and "
        "use 'import crosstrain.engine'."
    )

from crosstrain.engine.checkpoints.handler import Checkpoint, CheckpointEvents
from crosstrain.engine.checkpoints.loading import Latest, read_checkpoint
from crosstrain.engine.checkpoints.model_checkpoint import ModelCheckpoint
from crosstrain.engine.checkpoints.model_part import ModelPart
from crosstrain.engine.checkpoints.resumable import ResumableRun
from crosstrain.engine.checkpoints.resume import resume_or_start
from crosstrain.engine.checkpoints.retention import global_step_from_engine
from crosstrain.engine.checkpoints.save_handler import BaseSaveHandler
from crosstrain.engine.checkpoints.saver import DiskSaver
from crosstrain.engine.data.own_data import PerRank
from crosstrain.engine.data.permutation import PermutationSampler
from crosstrain.engine.data.shares import BatchShare, ShardedBatch, mean_over_ranks
from crosstrain.engine.data.source import ResumableSource
from crosstrain.engine.data.streams import SampleStreams, current_sample
from crosstrain.engine.ranks.agreement import agree
from crosstrain.engine.ranks.check import RankCheck
from crosstrain.engine.storage.errors import (
    CheckpointBusy,
    CheckpointContentError,
    CheckpointCorrupt,
    CheckpointError,
    CheckpointMismatch,
    CheckpointNotFound,
    CheckpointStoreMissing,
    CheckpointUnsafe,
    CheckpointWarning,
    CheckpointWriteError,
)
from crosstrain.engine.storage.locations import StorePath
from crosstrain.engine.storage.manifest import Manifest
from crosstrain.engine.training.captured import Captured
from crosstrain.engine.training.evaluation import EvaluationStep
from crosstrain.engine.training.ignite_steps import (
    convert_tensor,
    supervised_evaluation_step,
    supervised_evaluation_step_amp,
    supervised_training_step,
    supervised_training_step_amp,
    supervised_training_step_apex,
    supervised_training_step_tpu,
)
from crosstrain.engine.training.options import StepOptions
from crosstrain.engine.training.shards import LogicalShards
from crosstrain.engine.training.step import StepEvents, TrainingStep

from .deterministic import (
    DeterministicEngine,
    ReproducibleBatchSampler,
    keep_random_state,
    manual_seed,
    update_dataloader,
)
from .early_stopping import EarlyStopping
from .engine import Engine
from .errors import DataUsedUp, EmptyData, RankFailed, ResumeError, ResumeWarning
from .events import (
    CallableEventWithFilter,
    EventEnum,
    Events,
    EventsList,
    RemovableEventHandle,
    State,
)
from .proof import Checks, Proof
from .supervised import create_supervised_evaluator, create_supervised_trainer

__all__ = [
    "BaseSaveHandler",
    "BatchShare",
    "CallableEventWithFilter",
    "Captured",
    "Checkpoint",
    "CheckpointBusy",
    "CheckpointContentError",
    "CheckpointCorrupt",
    "CheckpointError",
    "CheckpointEvents",
    "CheckpointMismatch",
    "CheckpointNotFound",
    "CheckpointStoreMissing",
    "CheckpointUnsafe",
    "CheckpointWarning",
    "CheckpointWriteError",
    "Checks",
    "DataUsedUp",
    "DeterministicEngine",
    "DiskSaver",
    "EarlyStopping",
    "EmptyData",
    "Engine",
    "EvaluationStep",
    "EventEnum",
    "Events",
    "EventsList",
    "Latest",
    "LogicalShards",
    "Manifest",
    "ModelCheckpoint",
    "ModelPart",
    "PerRank",
    "PermutationSampler",
    "Proof",
    "RankCheck",
    "RankFailed",
    "RemovableEventHandle",
    "ReproducibleBatchSampler",
    "ResumableRun",
    "ResumableSource",
    "ResumeError",
    "ResumeWarning",
    "SampleStreams",
    "ShardedBatch",
    "State",
    "StepEvents",
    "StepOptions",
    "StorePath",
    "TrainingStep",
    "agree",
    "convert_tensor",
    "create_supervised_evaluator",
    "create_supervised_trainer",
    "current_sample",
    "global_step_from_engine",
    "keep_random_state",
    "manual_seed",
    "mean_over_ranks",
    "read_checkpoint",
    "resume_or_start",
    "supervised_evaluation_step",
    "supervised_evaluation_step_amp",
    "supervised_training_step",
    "supervised_training_step_amp",
    "supervised_training_step_apex",
    "supervised_training_step_tpu",
    "update_dataloader",
]
