# Sourced after launch.sh. `judge X.toml [--section.key value ...]`, the arguments of a `launch` that has come back, shows what
# a recurrent model has learnt, if its run is finished: the loss under every exit criterion, a policy that leaves after
# DEPTH iterations on average (default 3.5), a text that was written with it, and the report of the run (with matplotlib).
# latest-m4: a token that is left early shows its newest keys to deeper iterations. Without them these would miss it.

judge() {
    local config=$1 run
    shift
    run=$(python -m torchtitan_rd config --print-key job.dump_folder --job.config_file "$config" "$@") || return
    [ "$(_status_of "$run")" = finished ] || return 0  # a signal stopped it, as launch has said
    python -m torchtitan_rd pareto "$run/config.toml" "$run" --kv latest-m4 --target "${DEPTH:-3.5}" --replay \
        --policy "$run/policy.toml" --png "$run/pareto.png" --output "$run/pareto.json" || return
    python -m torchtitan_rd generate "$run" --exit-policy "$run/policy.toml" --prompt "The " --max-new-tokens 200 \
        --temperature 0.5 || return
    python -m torchtitan_rd report "$run" --picture "$run/pareto.png" --output "$run/report.html" || return
    echo "the policy, for generate --exit-policy: $run/policy.toml; pictures: $run/pareto.png and $run/report.html"
}
