# Sourced after launch.sh. `retrofit X.toml [--section.key value ...]` trains a dense Llama, makes a recurrent model of its
# layers 0-1, 4 (the core) and 7, and trains this as X.toml says. Beside it, at equal training FLOPs: the dense model
# continued, and the recurrent one from random weights. Then it prints the held-out losses of all of them. A run that
# stands is continued by `launch`, so the same command goes on after an interruption.

retrofit() {
    local config=$1 dense=train_configs/retrofit_debug_dense.toml folder start steps
    shift
    folder=$(python -m torchtitan_rd config --print-key job.dump_folder --job.config_file "$config" "$@") || return
    _trained "$dense" "$folder/dense" "$@" || return
    start=$(ls -d "$folder"/dense/checkpoint/step-* | sort -V | tail -n 1)
    python convert/llama_to_raven.py --input_dir "$start" --output_dir "$folder/start" --dcp --force \
        --prelude 0-1 --core 4 --coda 7 --mean_recurrence 8 --mean_backprop_depth 4 || return

    _trained "$config" "$folder/retrofitted" "$@" --checkpoint.initial_load_path "$folder/start" || return
    _trained "$config" "$folder/random" "$@" --model.overrides.adapter_start random || return
    steps=$(python scripts/retrofit_demo.py steps "$config" "$dense" "$@") || return
    _trained "$dense" "$folder/dense_continued" "$@" --training.steps "$steps" --training.shuffle_seed 1 \
        --checkpoint.initial_load_path "$start" || return
    python scripts/retrofit_demo.py table "$folder"
}

_trained() {  # $1: the TOML, $2: the dump folder, then overrides. Fails unless the run came to its end
    local config=$1 folder=$2
    shift 2
    launch "$config" "$@" --job.dump_folder "$folder" || return
    [ "$(_status_of "$folder")" = finished ]
}
