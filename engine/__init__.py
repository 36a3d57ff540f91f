"""The event-driven training loop, exact resume and checkpoints of crosstrain."""

if __name__ != "crosstrain.engine":
    raise ImportError(
        "crosstrain's engine was imported as 'engine'. Install the project (pip install -e .) and "
        "use 'import crosstrain.engine'."
    )

from .agreement import agree
from .checkpoint import Checkpoint, CheckpointEvents
from .checkpoint_errors import (
    CheckpointBusy,
    CheckpointContentError,
    CheckpointCorrupt,
    CheckpointError,
    CheckpointMismatch,
    CheckpointNotFound,
    CheckpointUnsafe,
    CheckpointWarning,
    CheckpointWriteError,
)
from .deterministic import (
    DeterministicEngine,
    ReproducibleBatchSampler,
    keep_random_state,
    manual_seed,
    update_dataloader,
)
from .disk_saver import DiskSaver
from .doors import (
    supervised_evaluation_step,
    supervised_evaluation_step_amp,
    supervised_training_step,
    supervised_training_step_amp,
    supervised_training_step_apex,
    supervised_training_step_tpu,
)
from .early_stopping import EarlyStopping
from .engine import Engine
from .evaluation_step import EvaluationStep
from .events import (
    CallableEventWithFilter,
    EventEnum,
    Events,
    EventsList,
    RemovableEventHandle,
    State,
)
from .global_step import global_step_from_engine
from .loading import Latest
from .manifest import Manifest
from .model_checkpoint import ModelCheckpoint
from .own_data import PerRank
from .permutation import PermutationSampler
from .progress import DataUsedUp, EmptyData
from .rank_check import RankCheck
from .ranks import RankFailed
from .resumable import ResumableRun
from .resume import resume_or_start
from .save_handler import BaseSaveHandler
from .sharded_latest import latest_sharded
from .sharded_load import ShardedCheckpoint, load_sharded, read_sharded
from .sharded_resume import resume_or_start_sharded
from .sharded_saver import ShardedSaver
from .shares import BatchShare, mean_over_ranks
from .snapshot import ResumeWarning
from .streams import SampleStreams, current_sample
from .supervised import create_supervised_evaluator, create_supervised_trainer
from .training_step import StepEvents, StepOptions, TrainingStep

__all__ = [
    "BaseSaveHandler",
    "BatchShare",
    "CallableEventWithFilter",
    "Checkpoint",
    "CheckpointBusy",
    "CheckpointContentError",
    "CheckpointCorrupt",
    "CheckpointError",
    "CheckpointEvents",
    "CheckpointMismatch",
    "CheckpointNotFound",
    "CheckpointUnsafe",
    "CheckpointWarning",
    "CheckpointWriteError",
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
    "Manifest",
    "ModelCheckpoint",
    "PerRank",
    "PermutationSampler",
    "RankCheck",
    "RankFailed",
    "RemovableEventHandle",
    "ReproducibleBatchSampler",
    "ResumableRun",
    "ResumeWarning",
    "SampleStreams",
    "ShardedCheckpoint",
    "ShardedSaver",
    "State",
    "StepEvents",
    "StepOptions",
    "TrainingStep",
    "agree",
    "create_supervised_evaluator",
    "create_supervised_trainer",
    "current_sample",
    "global_step_from_engine",
    "keep_random_state",
    "latest_sharded",
    "load_sharded",
    "manual_seed",
    "mean_over_ranks",
    "read_sharded",
    "resume_or_start",
    "resume_or_start_sharded",
    "supervised_evaluation_step",
    "supervised_evaluation_step_amp",
    "supervised_training_step",
    "supervised_training_step_amp",
    "supervised_training_step_apex",
    "supervised_training_step_tpu",
    "update_dataloader",
]
