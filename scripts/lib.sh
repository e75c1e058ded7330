# scripts/lib.sh — what the scripts share; sourced from the root of the checkout.

jobs=${QKV_JOBS:-$(nproc 2>/dev/null || echo 2)}

build_packages=(cmake ninja-build g++ libeigen3-dev catch2 libcli11-dev nlohmann-json3-dev ccache)

say() { printf -- '-- %s\n' "$*" >&2; }

# --- arguments ----------------------------------------------------------------------------------------------------------
# A script opens with a comment that says how it is called: that is what --help prints, and what it allows. An option is
# named there, `--fix`; one with a value has capitals behind it, `--out DIR`.

case $0 in
  /*) script=$0 ;;
  *) script=${OLDPWD:-$PWD}/$0 ;; # scripts come from the folder where they were called to the root
esac

usage() { awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$script"; }

refuse() {
  printf '%s: %s; --help says what there is\n' "${script##*/}" "$1" >&2
  exit 2
}

# read_arguments WORDS "$@": before anything runs or is written, answers --help, and refuses what the comment does not name
# with status 2. WORDS is a regular expression of the words that are no options: '' for none, '.*' for any.
read_arguments() {
  local words=$1 text argument option named
  shift
  text=$(usage)
  for argument; do
    case $argument in
      -h | --help)
        printf '%s\n' "$text"
        exit 0
        ;;
    esac
  done
  while (($#)); do
    argument=$1
    shift
    if [[ $argument != -* ]]; then
      [[ -n $words && $argument =~ ^($words)$ ]] || refuse "unknown word '$argument'"
      continue
    fi
    option=${argument%%=*}
    [[ $option =~ ^-[a-zA-Z][0-9]+$ ]] && option=${option:0:2} # -j4
    [[ $option =~ ^--?[a-zA-Z][a-zA-Z0-9-]*$ ]] || refuse "unknown option '$argument'"
    named=$(grep -oE -m 1 -e "(^|[^-a-zA-Z0-9])$option([ =][A-Z]+|[^-a-zA-Z0-9]|$)" <<<"$text") ||
      refuse "unknown option '$argument'"
    if [[ ${named#*"$option"} =~ ^[\ =][A-Z] ]]; then
      [[ $argument != "$option" ]] && continue
      (($#)) || refuse "$option needs a value"
      shift
    elif [[ $argument != "$option" ]]; then
      refuse "$option takes no value: '$argument'"
    fi
  done
}

# --- what is needed, and builds -----------------------------------------------------------------------------------------

# Is a package's content there, from whatever source? Libraries are looked for as packages, tools as commands.
have() {
  case $1 in
    cmake) cmake --version | grep -Eq '^cmake version (3\.(2[5-9]|[3-9][0-9])|[4-9])' ;;
    ninja-build) command -v ninja ;;
    g++) command -v c++ ;;
    clang) command -v clang++ ;;
    ccache | clang-format | clang-tidy) command -v "$1" ;;
    g++-aarch64-linux-gnu) command -v aarch64-linux-gnu-g++ ;;
    qemu-user) command -v qemu-aarch64 || command -v qemu-aarch64-static ;;
    *) dpkg-query -W -f '${db:Status-Status}\n' "$1" | grep -qx installed ;;
  esac >/dev/null 2>&1
}

# install_missing PACKAGE...: Debian and Ubuntu only; elsewhere, or with QKV_NO_INSTALL=1, CMake finds or fetches.
install_missing() {
  local package missing=()
  if [[ -z ${QKV_NO_INSTALL:-} ]] && command -v apt-get dpkg-query >/dev/null; then
    for package; do have "$package" || missing+=("$package"); done
    ((${#missing[@]})) || return 0
    local command="apt-get update -qq && apt-get install -qq -y --no-install-recommends ${missing[*]}"
    if ((EUID == 0)); then
      say "installing with apt-get: ${missing[*]}"
      DEBIAN_FRONTEND=noninteractive bash -c "$command" >/dev/null </dev/null && return 0
    elif sudo -n true 2>/dev/null; then
      say "installing with sudo apt-get: ${missing[*]}"
      sudo -n env DEBIAN_FRONTEND=noninteractive bash -c "$command" >/dev/null </dev/null && return 0
    fi
    say "missing: ${missing[*]}. As root, run:"
    say "    $command"
    say "or set QKV_NO_INSTALL=1 to let CMake look for or fetch what it needs."
    exit 2
  fi
  for package; do
    case $package in
      cmake | ninja-build | clang*) have "$package" || { say "needed and not found: ${package%-build}"; exit 2; } ;;
    esac
  done
}

# python_with MODULE PACKAGE: prints a Python that has MODULE; installs the distribution's package where none has.
python_with() {
  local python
  for python in "${QKV_PYTHON:-python3}" /usr/bin/python3; do
    "$python" -c "import $1" 2>/dev/null && { echo "$python"; return; }
  done
  install_missing "$2"
  /usr/bin/python3 -c "import $1" 2>/dev/null && { echo /usr/bin/python3; return; }
  say "needed and not found: the Python module $1 (pip install $1; QKV_PYTHON names the Python that has it)"
  exit 2
}

# configure_and_build PRESET [--target T]...
configure_and_build() {
  local preset=$1
  shift
  cmake --preset "$preset" && cmake --build "build/$preset" -j "$jobs" "$@"
}

# --- tiers: .ci/run and scripts/matrix run many builds and count --------------------------------------------------------

passed=0 failed=0 skipped=0 tier_rows=()

# tier NAME COMMAND...: one line of result. A command that writes ctest's $junit counts by its tests, another one as one.
tier() {
  local name=$1 start=$SECONDS log=$PWD/build/logs/$1.log status=0 p=0 f=0 s=0 note=""
  shift
  mkdir -p build/logs
  export junit=$PWD/build/logs/$name.xml
  rm -f "$junit"
  say "$name: $*"
  ("$@") >"$log" 2>&1 </dev/null || status=$?
  if [[ -s $junit ]]; then
    local total
    total=$(junit_count tests) f=$(junit_count failures) s=$(junit_count skipped)
    s=$((s + $(junit_count disabled))) p=$((total - f - s))
    ((status == 0 || f > 0)) || f=1
  elif ((status == 0)); then
    p=1 note=$(tail -n 1 "$log")
  else
    f=1
  fi
  if ((f)); then
    say "$name failed with status $status; the end of $log:"
    tail -n "${QKV_LOG_LINES:-60}" "$log" >&2
  fi
  passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
  local result
  result=$(printf '%-20s %4d passed, %2d failed, %2d skipped %6d s  %s' "$name" "$p" "$f" "$s" $((SECONDS - start)) "$note")
  printf '%s\n' "$result"
  tier_rows+=("| $name | $p | $f | $s | $((SECONDS - start)) s |")
}

junit_count() { grep -o -m1 "\\b$1=\"[0-9]*\"" "$junit" | grep -o '[0-9]*' | head -n 1; }

# preset_tier PRESET [core]: configure, build and test; `core` is kernels, caches and conformance only.
preset_tier() {
  local preset=$1 selection=$1${2:+-$2}
  cmake --preset "$preset" && cmake --build --preset "$selection" -j "$jobs" &&
    ctest --preset "$selection" -j "$jobs" --output-junit "$junit"
}
