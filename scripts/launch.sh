# Sourced after env.sh. `launch X.toml [--section.key value ...]` checks the config, then starts one rank a GPU (2 gloo
# ranks on a machine without GPUs) on this node, or on every node of the Slurm job.
#   NPROC=...          ranks on a node (default: the GPUs that may be used there, else 2)
#   CONFIG_FILE=...    another TOML than the script's own
#   REHEARSE=1         in place of the run: its whole life once, small, on this machine (docs/rehearsal.md)
#   REQUEUE=0          under Slurm: a run that was stopped is not requeued, since another job follows (a chain)
#   MAX_RESTARTS=...   how often torchrun restarts the ranks after a failure (default 0; 3 under Slurm)
# Settings of the allocator and of NCCL that every run wants are set here, unless the environment or a cluster's profile
# (scripts/profiles/, sourced before this file) has set them.

_set_defaults() {
    # Blocks of gigabytes (logits, gathered layers) fragment memory otherwise. torch knows the variable by three names: a
    # user's choice by any of them stands.
    if [ -z "${PYTORCH_ALLOC_CONF+x}${PYTORCH_CUDA_ALLOC_CONF+x}${PYTORCH_HIP_ALLOC_CONF+x}" ]; then
        export PYTORCH_ALLOC_CONF=expandable_segments:True
    fi
    export NCCL_DEBUG=${NCCL_DEBUG-WARN}  # says why NCCL fails; silent while it works
}

_raise_open_files() {  # $1: the number of ranks
    # Each rank holds a socket to every other one in each of two gloo groups (all ranks; checkpoints), those of its mesh
    # groups, NCCL's, and its files. Beyond a million some programs that close every possible file take minutes.
    local needed=$((3 * $1 + 512)) soft hard most=1048576
    soft=$(ulimit -Sn) hard=$(ulimit -Hn)
    if [ "$hard" = unlimited ] || [ "$hard" -gt "$most" ]; then hard=$most; fi
    if [ "$soft" != unlimited ] && [ "$soft" -lt "$hard" ]; then ulimit -Sn "$hard" && soft=$hard; fi
    if [ "$soft" != unlimited ] && [ "$soft" -lt "$needed" ]; then
        echo "launch.sh: a process may open $soft files here, and $1 ranks need about $needed each: raise the hard limit" \
            "(limits.conf, or LimitNOFILE of slurmd), or start-up ends with 'Too many open files'" >&2
    fi
}

_ranks_per_node() {
    local gpus
    # Those that may be used here: nvidia-smi lists all of a machine, whatever CUDA_VISIBLE_DEVICES says, and parts of them (MIG).
    gpus=${GPUS_PER_NODE:-$(python -c 'import torch; print(torch.cuda.device_count())')}
    [ "$gpus" -gt 0 ] && echo "$gpus" || echo 2
}

_status_of() {  # the "status" that the last run left in its dump folder, or nothing
    # Where rank 0 was on another node, NFS may remember here that there is no such file; opening its folder asks anew.
    python - "$1" <<'PY' 2>/dev/null
import json, os, sys
os.listdir(sys.argv[1])
print(json.load(open(os.path.join(sys.argv[1], "exit_status.json")))["status"])
PY
}

# torchrun on this node, with these arguments. It answers one signal: it passes it to its ranks and waits for them to save. A
# second one would end it and leave them alone, so further ones go straight to the ranks, which know what they mean
# (torchtitan_rd/signals.py). If this shell is killed torchrun is too, and the ranks end when they miss it
# (torchtitan_rd/reliability/launcher.py).
_torchrun() {
    local torchrun= watch= code was_told= shell=$BASHPID
    trap '_pass_on' TERM INT USR1 HUP QUIT  # before there is anything that this shell's death would leave alone
    set -m  # a process group of its own: a terminal's Ctrl-C comes to this shell alone, and from here once
    python -m torch.distributed.run "$@" &
    torchrun=$!
    # It has no output, so that whoever reads the shell's need not wait for its `sleep`.
    _kill_without "$shell" "$torchrun" </dev/null >/dev/null 2>&1 &
    watch=$!
    disown "$watch"  # bash would tell of its end
    set +m
    [ -z "$was_told" ] || kill -TERM "$torchrun" 2>/dev/null
    _wait_for "$torchrun"; code=$?
    kill "$watch" 2>/dev/null
    trap - TERM INT USR1 HUP QUIT
    return "$code"
}

_kill_without() {  # in a subshell of process $1: kills process $2 once $1 has died
    local own=$BASHPID
    trap - TERM INT USR1 HUP QUIT
    while [ "$(_parent_of "$own")" = "$1" ]; do  # `kill -0` would take a zombie for a living one
        sleep 1
    done
    kill -KILL "$2"
}

_parent_of() {  # not every system has the file, not every container the program
    local parent
    { read -r _ _ _ parent _ <"/proc/$1/stat" || parent=$(ps -o ppid= -p "$1"); } 2>/dev/null
    echo $((parent))
}

_pass_on() {
    was_signalled=1
    if [ -z "$torchrun" ]; then
        was_told=1  # it is told when it is there
    elif [ -z "$was_told" ]; then
        was_told=1
        kill -TERM "$torchrun" 2>/dev/null
    else
        # shellcheck disable=SC2046
        kill -TERM $(_children_of "$torchrun") 2>/dev/null
    fi
}

_children_of() {  # not every kernel has the file, not every container the program
    cat "/proc/$1/task/$1/children" 2>/dev/null || pgrep -P "$1"
}

_wait_for() {  # a trapped signal ends `wait` early
    local code
    wait "$1"; code=$?
    while kill -0 "$1" 2>/dev/null; do wait "$1"; code=$?; done
    return "$code"
}

# The ranks are those of the Slurm job, or those that the script's own header would ask for (its folder is this one), or
# those of this machine.
_rehearse() {
    local script nodes gpus config=$1
    shift
    script=$(basename "$0")
    nodes=${SLURM_NNODES:-$(_of_header nodes "$script")}
    gpus=${NPROC:-${GPUS_PER_NODE:-$(_of_header gpus-per-node "$script")}}
    python -m torchtitan_rd rehearse "$config" --ranks "$((${nodes:-1} * ${gpus:-$(_ranks_per_node)}))" "$@"
}

_of_header() {  # $1: an option of sbatch, $2: the script
    sed -n "s/^#SBATCH --$1=\([0-9]*\)$/\1/p" "$2" 2>/dev/null | head -n 1
}

launch() {
    local config=${CONFIG_FILE:-$1} dump_folder code was_signalled=
    shift
    if [ -n "${REHEARSE:-}" ]; then
        _rehearse "$config" "$@"
        return
    fi
    _set_defaults
    local nodes=${SLURM_NNODES:-1} rendezvous=(--standalone) per_node ranks
    per_node=${NPROC:-$(_ranks_per_node)}
    ranks=$((nodes * per_node))
    # Every contradiction in the config, one a line, before torchrun or Slurm start anything.
    dump_folder=$(python -m torchtitan_rd config --print-key job.dump_folder --ranks "$ranks" \
        --job.config_file "$config" "$@") || return 1
    # What an earlier run left must not be read for this one's; where it cannot be removed nothing can be written either.
    rm -f "$dump_folder/exit_status.json" || return 1
    _raise_open_files "$ranks"
    if [ "$nodes" -gt 1 ]; then
        local head
        head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
        rendezvous=(--rdzv_id "$SLURM_JOB_ID" --rdzv_backend c10d --rdzv_endpoint "$head:$((20000 + SLURM_JOB_ID % 20000))")
        # The nodes' torchruns count restarts each for itself, so ranks cannot tell by the count which attempt is theirs: each
        # attempt gets a store and a port of its own.
        export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
        # srun does not take it from the job by itself, and one core would serve all ranks of a node. The one task of a node
        # has the cores of all that the job asked for.
        if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
            local tasks=$((${SLURM_NTASKS:-$nodes} / nodes))
            export SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-$((SLURM_CPUS_PER_TASK * (tasks > 0 ? tasks : 1)))}
        fi
    fi
    # torchrun passes a signal on and then waits this long for the ranks to save their checkpoint (torch 2.11: 30 s).
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}
    set -- --nnodes "$nodes" --nproc_per_node "$per_node" \
        --max_restarts "${MAX_RESTARTS:-$([ -n "${SLURM_JOB_ID:-}" ] && echo 3 || echo 0)}" \
        --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
        "${rendezvous[@]}" -m torchtitan_rd.train --job.config_file "$config" "$@"
    if [ "$nodes" -gt 1 ]; then
        # --propagate: the limit that was raised here holds on every node. --export: so does the environment, though the job
        # was submitted with --export=NONE, which srun would follow. One task a node, whatever the job asked for. srun passes
        # USR1 on to each node's shell; a TERM it answers by killing all tasks at once.
        srun --propagate=NOFILE --export=ALL --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 \
            bash -c 'source "$0" && _torchrun "$@"' "${BASH_SOURCE[0]}" "$@" &
        local srun=$!
        trap 'was_signalled=1; kill -USR1 "$srun" 2>/dev/null' TERM INT USR1 HUP QUIT
        _wait_for "$srun"; code=$?
        trap - TERM INT USR1 HUP QUIT
    else
        _torchrun "$@"; code=$?
    fi
    _end_of "$(_status_of "$dump_folder")" "$code"
}

_end_of() {  # $1: the status of the run, $2: the exit code of torchrun
    case "$1" in
        finished) return 0 ;;
        preempted)
            # Where somebody sits at a terminal (salloc, a session in the browser) a requeue would end all that runs there.
            if [ -z "${SLURM_JOB_ID:-}" ] || [ -t 0 ]; then
                echo "stopped by a signal with a checkpoint saved: the same command goes on from there" >&2
            elif [ "${REQUEUE:-1}" = 0 ]; then
                echo "preempted with a checkpoint saved: the next job of the chain goes on from there" >&2
            else
                _requeue || return 1
            fi
            return 0 ;;
        stopped)
            echo "stopped by a signal, and no checkpoint saved of that step: not requeued" >&2
            return 130 ;;
        looping)
            echo "one step fails each time: not started again (failures.json in the dump folder tells)" >&2
            return 3 ;;
        "")
            if [ -n "$was_signalled" ]; then
                echo "stopped by a signal before the run began" >&2
                return 130
            fi ;;
    esac
    [ "$2" -ne 0 ] || return 1
    return "$2"
}

_requeue() {
    # A task of an array by its place in it: one of them has the number of the array, which stands for all tasks.
    local job=$SLURM_JOB_ID
    [ -z "${SLURM_ARRAY_JOB_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    echo "preempted with a checkpoint saved: requeueing job $job" >&2
    scontrol requeue "$job" && return
    echo "Slurm does not requeue it: submit the same command again, which goes on from there" >&2
    return 1
}
