"""A runner of a few lines of shell, and ways to break it; it answers as much as is asked for, and only zeros."""

# Answers at once, as far as the counts go: for faults in which no answer is looked at.
QUICK = """
while [ "$1" ]; do
  case $1 in --output_dir) out=$2 ;; --profiling_level) profile=1 ;; --input_list) list=$2 ;; esac
  shift
done
i=0
while read -r line; do
  mkdir -p "$out/Result_$i"
  head -c 768 /dev/zero >"$out/Result_$i/out_sample.raw"
  i=$((i + 1))
done <"$list"
[ -z "$profile" ] || echo profile >"$out/qnn-profiling-data_0.log"
"""

# What is replaced, by what, and what is then said of a run of two samples.
SHORT_ANSWERS = [
    ("head -c 768", "head -c 384", "answered .*'bytes': '768'.*'bytes': 1536} were to come"),
    ("i=$((i + 1))", "", "'results': '1'"),
]
