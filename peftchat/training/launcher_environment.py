"""What launchers leave in the environment: which variables describe this process, and which are ignored.

torchrun, accelerate, Slurm, MPI and DeepSpeed tell a process its rank by variables. Shells inherit them, scripts set
some of them, and libraries read them whoever set them. So they are read once, here: a complete and consistent set is a
launcher's, an incomplete one is removed with a note, and a contradictory one is refused.
"""

import re
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass

from peftchat.errors import UserError

_RANK, _WORLD_SIZE, _LOCAL_RANK, _LOCAL_WORLD_SIZE = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"
_PROCESS = (_RANK, _WORLD_SIZE, _LOCAL_RANK, _LOCAL_WORLD_SIZE)
_MASTER = ("MASTER_ADDR", "MASTER_PORT")

_MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
"""Rank, size, local rank and local size, of Open MPI, MVAPICH, and Intel MPI or MPICH."""

_MPI_PORT = "29500"
"""torch's default; mpirun has no port of its own to offer."""

# `srun --pty` starts a shell, and `salloc` an interactive step; neither is a task of a training.
_SLURM_PTY = ("SLURM_PTY_PORT", "SLURM_PTY_WIN_COL", "SLURM_PTY_WIN_ROW")


@dataclass(frozen=True, slots=True)
class LaunchedProcess:
    """This process among those that a launcher started.

    Attributes:
        rank: its number among all processes.
        world_size: processes on all machines.
        local_rank: its number on this machine.
        local_world_size: processes on this machine.
        master_addr: host where the processes meet.
        master_port: port where they meet.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: str

    def variables(self) -> dict[str, str]:
        """Return torch's variables."""
        values = (self.rank, self.world_size, self.local_rank, self.local_world_size)
        return dict(zip(_PROCESS, map(str, values), strict=True)) | {
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": self.master_port,
        }


@dataclass(frozen=True, slots=True)
class LauncherEnvironment:
    """What the environment says about processes and about the run.

    Attributes:
        process: this process, if a launcher started it.
        removed: variables that no library may read.
        ignored: of those, what a user has to know: `NAME=value (reason)`.
    """

    process: LaunchedProcess | None
    removed: frozenset[str]
    ignored: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _RecipeDecides:
    """A variable that would change a run behind its recipe's back.

    Attributes:
        name: its name, or a prefix that ends with an underscore.
        decides: what decides instead; None: it only details another variable, and is removed without a note.
        neutral: values, in lower case, that change nothing.
    """

    name: str
    decides: str | None = None
    neutral: tuple[str, ...] = ("", "0", "false", "no", "none")


# Read by accelerate 1.15 (`accelerator.py`, `state.py`, `utils/dataclasses.py`), by transformers 5.23
# (`training_args.py`, `integrations/fsdp.py`), and by DeepSpeed 0.19 (`accelerator/real_accelerator.py`).
_RECIPE_DECIDES = (
    _RecipeDecides("ACCELERATE_MIXED_PRECISION", "model.dtype decides"),
    _RecipeDecides("ACCELERATE_DOWNCAST_BF16", "model.dtype decides"),
    _RecipeDecides(
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "training.gradient_accumulation_steps decides", ("", "1", "auto")
    ),
    _RecipeDecides("ACCELERATE_GRADIENT_CLIPPING", "training.max_grad_norm decides", ("", "auto", "none")),
    _RecipeDecides("ACCELERATE_USE_FSDP", "distributed.strategy decides"),
    _RecipeDecides("ACCELERATE_USE_DEEPSPEED", "distributed.strategy decides"),
    _RecipeDecides("ACCELERATE_USE_MEGATRON_LM", "distributed.strategy decides"),
    _RecipeDecides("ACCELERATE_USE_PARALLELISM_CONFIG", "distributed.strategy decides"),
    _RecipeDecides("ACCELERATE_USE_SAGEMAKER", "distributed.strategy decides"),
    _RecipeDecides("ACCELERATE_DEEPSPEED_CONFIG_FILE", "distributed.deepspeed_config decides"),
    _RecipeDecides("ACCELERATE_DYNAMO_BACKEND", "training.torch_compile decides"),
    _RecipeDecides("ACCELERATE_USE_CPU", "the run takes the GPUs that CUDA_VISIBLE_DEVICES shows"),
    _RecipeDecides("ACCELERATE_TORCH_DEVICE", "the run takes the GPUs that CUDA_VISIBLE_DEVICES shows", ("",)),
    _RecipeDecides("DS_ACCELERATOR", "the run takes the GPUs that CUDA_VISIBLE_DEVICES shows", ("",)),
    _RecipeDecides("ACCELERATE_DYNAMO_"),
    _RecipeDecides("ACCELERATE_DEEPSPEED_"),
    _RecipeDecides("ACCELERATE_CONFIG_DS_FIELDS"),
    _RecipeDecides("ACCELERATE_FP8_"),
    _RecipeDecides("ACCELERATE_BYPASS_DEVICE_MAP"),
    _RecipeDecides("ACCELERATE_ALLOW_CP_STANDALONE"),
    _RecipeDecides("ACCELERATE_SAGEMAKER_"),
    _RecipeDecides("FP8_"),
    _RecipeDecides("FSDP_"),
    _RecipeDecides("MEGATRON_LM_"),
    _RecipeDecides("PARALLELISM_CONFIG_"),
)


def clean_environment(environment: MutableMapping[str, str], *, trains: bool = True) -> tuple[str, ...]:
    """Leave torch's variables in the environment if a launcher started this process, and nothing that misleads.

    Called again, it changes nothing.

    Args:
        environment: usually `os.environ`.
        trains: whether this process trains; other commands are one process each, whatever the environment says.

    Returns:
        What was ignored, as `LauncherEnvironment.ignored`.

    Raises:
        UserError: the variables contradict each other.
    """
    if not trains:
        for name in [name for name in environment if _describes_process(name) or _decided_by_recipe(name)]:
            del environment[name]
        return ()
    read = read_environment(environment)
    for name in read.removed:
        del environment[name]
    if read.process is not None:
        environment.update(read.process.variables())
    return read.ignored


def read_environment(environment: Mapping[str, str]) -> LauncherEnvironment:
    """Decide which variables are a launcher's.

    Raises:
        UserError: they contradict each other.
    """
    given = {name: value.strip() for name, value in environment.items() if value.strip()}
    process = _from_torch(given) or _from_slurm(given) or _from_mpi(given)
    removed = {name for name in environment if _decided_by_recipe(name) or _of_mpi(name)}
    ignored = [*_settings_ignored(environment)]
    if process is None:
        removed |= {name for name in environment if _describes_process(name)}
        ignored += _processes_ignored(given)
    threads = environment.get("OMP_NUM_THREADS")
    if threads is not None and not threads.strip().isdecimal():
        # OpenMP also takes a list for nested regions; accelerate takes one number or fails.
        removed.add("OMP_NUM_THREADS")
        if threads.strip():
            ignored.append(f"OMP_NUM_THREADS={threads} (it has to be one number)")
    return LauncherEnvironment(process, frozenset(removed), tuple(ignored))


def _describes_process(name: str) -> bool:
    return name in _PROCESS or name == "LOCAL_SIZE" or name.startswith("TORCHELASTIC_") or _of_mpi(name)


def _of_mpi(name: str) -> bool:
    return any(name in family for family in _MPI)


def _decided_by_recipe(name: str) -> _RecipeDecides | None:
    return next(
        (one for one in _RECIPE_DECIDES if name == one.name or (one.name.endswith("_") and name.startswith(one.name))),
        None,
    )


def _settings_ignored(environment: Mapping[str, str]) -> Iterator[str]:
    for name, value in sorted(environment.items()):
        found = _decided_by_recipe(name)
        if found is not None and found.decides and value.strip().lower() not in found.neutral:
            yield f"{name}={value} ({found.decides})"


def _processes_ignored(given: Mapping[str, str]) -> Iterator[str]:
    left = [f"{name}={given[name]}" for name in _PROCESS if name in given]
    if left:
        yield f"{' '.join(left)} (a launcher sets {', '.join((*_PROCESS[:3], *_MASTER))} together)"
    if given.get("SLURM_NTASKS", "1") != "1":
        yield f"SLURM_NTASKS={given['SLURM_NTASKS']} (this process is not a task of `srun`)"
    for _, size, _, _ in _MPI:
        if given.get(size, "1") != "1":
            yield f"{size}={given[size]} (mpirun also sets the rank, and the rank and size on this machine)"


def _from_torch(given: Mapping[str, str]) -> LaunchedProcess | None:
    """Return the process that torch's own variables describe; torchrun, accelerate and DeepSpeed set them."""
    if _RANK not in given or _WORLD_SIZE not in given:
        return None
    names = [name for name in (*_PROCESS, *_MASTER) if name in given]
    rank, world_size = (_number(given, name, names) for name in (_RANK, _WORLD_SIZE))
    missing = [name for name in (_LOCAL_RANK, *_MASTER) if name not in given]
    if missing:
        _check(rank, world_size, 0, world_size, names, given)
        other = _from_slurm(given) or _from_mpi(given)
        if world_size == 1 or (other is not None and (other.rank, other.world_size) == (rank, world_size)):
            return other
        raise _refused(
            f"RANK={rank} and WORLD_SIZE={world_size} are set, but {' and '.join(missing)} {_is(missing)} not",
            names,
        )
    local_rank = _number(given, _LOCAL_RANK, names)
    # DeepSpeed's launcher calls it LOCAL_SIZE.
    local = next((name for name in (_LOCAL_WORLD_SIZE, "LOCAL_SIZE") if name in given), None)
    local_world_size = _number(given, local, names) if local else world_size
    _check(rank, world_size, local_rank, local_world_size, names, given)
    check_port(given["MASTER_PORT"], names)
    return LaunchedProcess(rank, world_size, local_rank, local_world_size, given["MASTER_ADDR"], given["MASTER_PORT"])


def _from_slurm(given: Mapping[str, str]) -> LaunchedProcess | None:
    """Return the task that `srun` started, as one of several.

    SLURM_NTASKS is also set in a batch script and in an interactive allocation, where nobody started that many.
    https://slurm.schedmd.com/srun.html#SECTION_OUTPUT-ENVIRONMENT-VARIABLES
    """
    tasks = given.get("SLURM_STEP_NUM_TASKS", "")
    if not tasks.isdecimal() or int(tasks) < 2 or any(name in given for name in _SLURM_PTY):
        return None
    names = ["SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_JOB_ID"]
    if any(name not in given for name in names):
        return None
    nodes = given.get("SLURM_STEP_NODELIST") or given.get("SLURM_JOB_NODELIST")
    rank, world_size, local_rank, job = (_number(given, name, names) for name in names)
    local_world_size = _slurm_tasks_here(given, world_size)
    _check(rank, world_size, local_rank, local_world_size, names, given)
    address = given.get("MASTER_ADDR") or (_first_host(nodes) if nodes else None)
    if address is None:
        return None
    step = given.get("SLURM_STEP_ID", "0")
    # Every task of a step derives the same port, and another step of the job another one.
    port = 20000 + (job + (int(step) if step.isdecimal() else 0)) % 20000
    return LaunchedProcess(
        rank, world_size, local_rank, local_world_size, address, given.get("MASTER_PORT") or str(port)
    )


def _slurm_tasks_here(given: Mapping[str, str], world_size: int) -> int:
    """Return the step's tasks on this machine, from a list such as `4(x2),3` of all machines."""
    per_node: list[int] = []
    listed = given.get("SLURM_STEP_TASKS_PER_NODE") or given.get("SLURM_TASKS_PER_NODE") or ""
    for part in listed.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            break
        per_node += [int(found[1])] * int(found[2] or 1)
    node = given.get("SLURM_NODEID", "0")
    if sum(per_node) == world_size and node.isdecimal() and int(node) < len(per_node):
        return per_node[int(node)]
    same = given.get("SLURM_NTASKS_PER_NODE", "")
    return int(same) if same.isdecimal() else world_size


def _first_host(nodes: str) -> str:
    """Return the first machine of a Slurm list, such as `gpu[03-07,11],cpu1`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0] if first else nodes)


def _from_mpi(given: Mapping[str, str]) -> LaunchedProcess | None:
    """Return the process that mpirun started, as one of several."""
    for names in _MPI:
        if any(name not in given for name in names) or given[names[1]] == "1":
            continue
        rank, world_size, local_rank, local_world_size = (_number(given, name, names) for name in names)
        _check(rank, world_size, local_rank, local_world_size, names, given)
        if "MASTER_ADDR" not in given and local_world_size != world_size:
            raise UserError(
                f"mpirun started {world_size} processes on several machines, but MASTER_ADDR is not set",
                where="environment",
                hint="Pass the first machine to all of them, such as `mpirun -x MASTER_ADDR=HOST …`.",
            )
        port = given.get("MASTER_PORT", _MPI_PORT)
        check_port(port, ("MASTER_PORT",))
        address = given.get("MASTER_ADDR", "127.0.0.1")
        return LaunchedProcess(rank, world_size, local_rank, local_world_size, address, port)
    return None


def _number(given: Mapping[str, str], name: str, names: "list[str] | tuple[str, ...]") -> int:
    if not re.fullmatch(r"\d{1,9}", given[name]):
        raise _refused(f"{name}={given[name]} is not a whole number, 0 or more", names)
    return int(given[name])


def _check(
    rank: int,
    world_size: int,
    local_rank: int,
    local_world_size: int,
    names: "list[str] | tuple[str, ...]",
    given: Mapping[str, str],
) -> None:
    values = ", ".join(f"{name}={given[name]}" for name in names if name in given and name not in _MASTER)
    if rank >= world_size:
        raise _refused(f"the rank is not below the number of processes ({values})", names)
    if local_rank >= local_world_size or local_world_size > world_size or local_rank > rank:
        raise _refused(f"the rank on this machine contradicts the rank among all processes ({values})", names)


def check_port(port: str, names: "list[str] | tuple[str, ...]") -> None:
    """Check that a text is a port.

    Raises:
        UserError: it is not; the hint names the variables.
    """
    if not re.fullmatch(r"\d{1,5}", port) or not 0 < int(port) < 2**16:
        raise _refused(f"MASTER_PORT={port} is not a port from 1 to 65535", names)


def _refused(message: str, names: "list[str] | tuple[str, ...]") -> UserError:
    return UserError(
        message,
        where="environment",
        hint=f"Start with torchrun, srun or mpirun. In an ordinary shell: `unset {' '.join(names)}`.",
    )


def _is(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"
