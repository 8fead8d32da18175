#!/system/bin/sh
# Runs the graphs of a pushed bundle, in the steps that are asked for.
#
#   sh run.sh RUN SOC LIMIT_S "STEP[=COUNT]..." GRAPH[:native]...
#
#   check              every file has its checksum
#   env                the runner can be started; before anything that runs a graph
#   accuracy           every sample once, answers kept
#   latency=N          the first sample N times
#   profile=N          the same, with the cycles of every op; slower, and never a latency
#   sustained=SECONDS  the same, so long, in the mode for long work
#   loop               one call of a sampling loop, alone and of one graph: everything of it is in ../loop instead of
#                      ../out; the list is ../loop/GRAPH.txt, and ../loop/GRAPH.sums has the checksums of what it names.
#                      Answers of other graphs stay there, as inputs for this one.
#
# A graph's input files hold float32, which the runner converts; after `:native` they hold the graph's own type.
# Steps that take times leave what the phone says of its temperature before and after.
#
# ../out/status has one line per step, is replaced whole after each, and ends with `done` or `fail STEP WHY DETAIL`.
# Whatever the shell's caller sees of this script's exit code or output, only that file counts. It is written for mksh
# and toybox as Android has them, uses builtins where there are any, and runs in other POSIX shells too.

run=$1 soc=$2 limit=$3 steps=$4
shift 4
cd "${0%/*}" || exit 9
out=../out
[ "$steps" = loop ] && out=../loop
runner=./bin/qnn-net-run
lines="run $run" step=start child= watcher=

say() {
  lines="$lines
$1"
  echo "$lines" >"$out/status.new" && mv -f "$out/status.new" "$out/status" || exit 9
  echo "$1"
}

fail() {
  say "fail $step $1"
  exit 1
}

hangup() {
  # The cable was pulled or the caller gave up: adbd tells this shell alone, and the runner would go on for ever.
  trap '' HUP TERM PIPE
  [ -n "$watcher" ] && kill "$watcher" 2>/dev/null
  [ -n "$child" ] && kill -9 "$child" 2>/dev/null && wait "$child"
  fail hangup >/dev/null 2>&1
}

# Looks after process $1: notes the most memory it ever had, and ends it at the limit.
watch() {
  ticks=0 peak=
  while kill -0 "$1" 2>/dev/null; do
    while read -r key value rest; do
      if [ "$key" = VmHWM: ] && [ "$value" != "$peak" ]; then
        peak=$value
        echo "$peak" >"$out/peak"
      fi
    done 2>/dev/null <"/proc/$1/status"
    ticks=$((ticks + 1))
    if [ "$ticks" -gt $((limit * 5)) ]; then
      echo hung >"$out/hung"
      kill -9 "$1"
      return
    fi
    sleep 0.2
  done
}

# Runs a program with its output in the file $1; sets code and peak_kb.
guarded() {
  log=$1
  shift
  rm -f "$out/hung" "$out/peak"
  "$@" >"$log" 2>&1 </dev/null &
  child=$!
  watch "$child" >/dev/null 2>&1 </dev/null &
  watcher=$!
  wait "$child"
  code=$?
  child=
  kill "$watcher" 2>/dev/null
  watcher=
  peak_kb=0
  [ -f "$out/peak" ] && read -r peak_kb <"$out/peak"
  [ -f "$out/hung" ] && fail "hung $limit"
  return 0
}

# Sets files and bytes to the count and size of the files given; a pattern that matched nothing counts as none.
measure() {
  files=0 bytes=0
  for file; do
    if [ -f "$file" ]; then
      files=$((files + 1))
      bytes=$((bytes + $(wc -c <"$file")))
    fi
  done
}

# Compares files with the checksums in the file $1; without it, all that was pushed.
check_step() {
  checked=0
  while read -r sum name; do
    found=
    [ -f "$name" ] && found=$(sha256sum "$name")
    [ "${found%% *}" = "$sum" ] || fail "bad_checksum $name"
    checked=$((checked + 1))
  done <"${1:-sums.txt}"
  say "check ok files=$checked"
}

env_step() {
  [ -f "$runner" ] || fail "no_runner $runner"
  chmod 755 bin/* || fail "no_runner $runner"
  # The folders of the Hexagon's libraries are separated by `;`, unlike those of the processor's.
  export LD_LIBRARY_PATH="$PWD/lib"
  export ADSP_LIBRARY_PATH="$PWD/lib;/vendor/dsp/cdsp;/vendor/lib/rfsa/adsp;/system/lib/rfsa/adsp;/dsp"
  guarded "$out/env.log" "$runner" --version
  [ "$code" = 0 ] || fail "runner_unusable $code"
  say "env ok"
}

# Sets graph to the name of graph argument $1, and native to the option for its inputs.
parse() {
  graph=${1%:native} native=
  [ "$graph" = "$1" ] || native=--use_native_input_files
}

# Runs the graph in step $1 with the input list $2 and further options of the runner.
run_graph() {
  folder=$out/$1/$graph log=$out/$1-$graph.log list=$2
  shift 2
  mkdir -p "$folder" || fail "no_space $folder"
  guarded "$log" "$runner" --backend lib/libQnnHtp.so --retrieve_context "models/$soc/${graph}_qnn.bin" \
    --input_list "$list" --output_dir "$folder" --log_level warn $native "$@"
  [ "$code" = 0 ] || fail "runner_failed $graph $code"
}

# Adds what the phone says of its temperature, headed by $1, to the results of this step and graph.
climate() {
  mkdir -p "$out/$step/$graph" || fail "no_space $out"
  { echo "sdconvert-climate $1"; dumpsys thermalservice; dumpsys battery; } >>"$out/$step/$graph/climate" 2>/dev/null
}

# Runs the graph in this step as `run_graph` does, and tells what answers came.
answer() {
  run_graph "$step" "$@"
  results=0
  for folder in "$out/$step/$graph"/Result_*; do
    [ -d "$folder" ] && results=$((results + 1))
  done
  measure "$out/$step/$graph"/Result_*/*.raw
  say "$step ok graph=$graph results=$results files=$files bytes=$bytes peak_kb=$peak_kb"
}

loop() {
  step=check
  check_step "$out/$graph.sums"
  step=env
  env_step
  step=answer
  rm -rf "$out/answer/$graph"
  say "begin answer graph=$graph"
  answer "$out/$graph.txt" --perf_profile burst --profiling_level basic
}

# Runs the first sample again and again for its time; the arguments are options of the runner.
timed() {
  read -r first <"input_list_$graph.txt"
  echo "$first" >"$out/first_$graph.txt"
  climate before
  run_graph "$step" "$out/first_$graph.txt" --keep_num_outputs 1 "$@"
  climate after
  measure "$out/$step/$graph"/qnn-profiling-data_*.log
  [ "$bytes" -gt 0 ] || fail "no_profile $graph"
  say "$step ok graph=$graph count=$count files=$files bytes=$bytes peak_kb=$peak_kb"
}

[ "$steps" = loop ] || rm -rf "$out"
mkdir -p "$out" || exit 9
# PIPE: whoever reads what this script says has gone, which may be noticed before the hangup.
trap hangup HUP TERM PIPE

for word in $steps; do
  step=${word%=*} count=${word#*=}
  case $step in check | env)
    say "begin $step"
    "${step}_step"
    continue
    ;;
  esac
  for argument; do
    parse "$argument"
    say "begin $step graph=$graph"
    case $step in
      accuracy) answer "input_list_$graph.txt" ;;
      loop) loop ;;
      latency) timed --perf_profile burst --profiling_level basic --num_inferences "$count" ;;
      profile) timed --perf_profile burst --profiling_level detailed --num_inferences "$count" ;;
      sustained) timed --perf_profile sustained_high_performance --profiling_level basic --duration "$count" ;;
      *) fail "no_step $step" ;;
    esac
  done
done

say "done"
