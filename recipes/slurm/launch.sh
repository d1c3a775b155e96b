# shellcheck shell=bash
# What train.slurm and evaluate.slurm share. Sourced by them, from the folder in which the job was submitted.

fail() {
    echo "error: $1" >&2
    exit 2
}

# accelerator NAME: the path of an Accelerate config: a name in recipes/configs/accelerate, or a file.
accelerator() {
    local file=$1
    [[ $file == *.yaml ]] || file=recipes/configs/accelerate/$1.yaml
    [[ -f $file ]] || fail "--accelerate must be a file, or a name in recipes/configs/accelerate; got '$1'."
    echo "$file"
}

# launch CONFIG PROCESSES_PER_NODE DRY_RUN SCRIPT FLAGS...: one `accelerate launch` on each node of the job.
launch() {
    local config=$1 per_node=$2 dry_run=$3
    shift 3
    local nodes=${SLURM_JOB_NUM_NODES:-1}
    [[ $per_node =~ ^[1-9][0-9]*$ ]] || fail "--processes_per_node must be a whole number above 0; got '$per_node'."
    if grep -q '^distributed_type: "NO"' "$config" && ((nodes * per_node > 1)); then
        fail "$config starts one process, and this job has $nodes node(s) of $per_node. Use --accelerate ddp."
    fi

    # A port of its own for each job, where its nodes meet. One node needs no rendezvous.
    local port=$((20000 + ${SLURM_JOB_ID:-0} % 20000))
    local command=(accelerate launch --config_file "$config" --num_machines "$nodes"
        --num_processes "$((nodes * per_node))" --main_process_port "$port")
    if ((nodes > 1)); then
        local first=${SLURM_LAUNCH_NODE_IPADDR:-localhost}
        if command -v scontrol >/dev/null; then
            first=$(scontrol show hostnames "${SLURM_JOB_NODELIST:-}" | head -n 1)
        fi
        command+=(--main_process_ip "$first" --rdzv_backend c10d)
    fi
    command+=("$@")

    # torchrun, which `accelerate launch` runs, kills processes 30 seconds after SIGTERM; this leaves time for a save.
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-280}
    export PET_RDZV_ID=${SLURM_JOB_ID:-0}
    if [[ $(basename "$config") == cpu.yaml ]]; then export ACCELERATE_USE_CPU=true; fi
    # Until training begins, and for the launcher of one process, SIGTERM is nothing.
    local run=(srun --nodes "$nodes" --ntasks-per-node 1 --kill-on-bad-exit=1 --label
        bash -c "trap '' TERM; exec \"\$@\"" launch "${command[@]}")
    printf '%q ' "${run[@]}"
    echo
    [[ $dry_run == yes ]] || "${run[@]}"
}

# ends_soon: whether the time limit of the job is so near that SIGTERM has been sent (--signal=TERM@300).
ends_soon() {
    [[ -n ${SLURM_JOB_END_TIME:-} ]] && ((SLURM_JOB_END_TIME - $(date +%s) < 330))
}
