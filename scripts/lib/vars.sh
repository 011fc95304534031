# shellcheck shell=bash
# Variables of a launcher: declared once, read from the environment, checked before anything starts, shown by --help.
#
#   preset NAME DEFAULT              another default for this launcher; before the declaration (fixed: the only value)
#   var NAME TYPE DEFAULT MEANING [--flag]   the one declaration; DEFAULT may use $OTHER (declared before), expanded when
#                                    read; --flag is the train.py flag that flags_from_variables makes of it (@--flag:
#                                    only in its second call, for flags that depend on others)
#   launcher_init "$@"               --help, --variables (tab separated), NAME=value and `-- more train.py flags`; then
#                                    reads and checks all variables and stops with every wrong one at once (exit 2)
#
# TYPE, with a final "?" where an empty value is allowed:
#   str  name  list  bool  int:MIN[:MAX]  float:(LO,HI] (brackets as in an interval)  ratio  choice:a,b,c
#   dir  file  model (a directory with config.json)  out (a directory that can be made)  cmd  gpus  port  url  runs

_VAR_NAMES=()
_VAR_ERRORS=()
declare -A _VAR_TYPE=() _VAR_DEFAULT=() _VAR_HELP=() _VAR_GROUP=() _VAR_PRESET=() _VAR_FROM=() _VAR_FLAG=()
_GROUP="Settings"
LAUNCHER_ABOUT=""
# shellcheck disable=SC2034  # read by the launchers
PASS_THROUGH=()

group() { _GROUP=$1; }
about() { LAUNCHER_ABOUT=$1; }
preset() { _VAR_PRESET[$1]=$2; }

fixed() { # fixed NAME VALUE: what this launcher is about; another value in the environment is refused
  if [[ -n ${!1-} && ${!1} != "$2" ]]; then bad "$1" "$2, which $LAUNCHER_NAME is for (run_opd.sh takes any)"; fi
  preset "$1" "$2"
}

var() {
  local name=$1
  if [[ -z ${_VAR_TYPE[$name]+set} ]]; then _VAR_NAMES+=("$name"); fi
  _VAR_TYPE[$name]=$2
  _VAR_DEFAULT[$name]=${_VAR_PRESET[$name]-$3}
  _VAR_HELP[$name]=$4
  _VAR_GROUP[$name]=$_GROUP
  _VAR_FLAG[$name]=${5-}
}

loosen() { _VAR_TYPE[$1]="str?"; } # of a variable that this launcher fills in itself, after the declaration

die() { # one line, exit 2: a setting is wrong
  printf 'error: %s\n' "$*" >&2
  exit 2
}

bad() { # bad NAME EXPECTED: collect one wrong variable
  local name=$1
  _VAR_ERRORS+=("$name=${!name-}: expected $2")
}

_expand() { # REPLY = $1 with $NAME and ${NAME} replaced once; values are not expanded again
  local rest=$1 out=""
  while [[ $rest =~ ^([^\$]*)\$\{?([A-Za-z_][A-Za-z0-9_]*)\}?(.*)$ ]]; do
    rest=${BASH_REMATCH[3]}
    local name=${BASH_REMATCH[2]}
    out+=${BASH_REMATCH[1]}${!name-}
  done
  REPLY=$out$rest
}

_is_number() { [[ $1 =~ ^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$ ]]; }

_in_interval() { # VALUE "(0,1]"
  local interval=$2
  local body=${interval:1:${#interval}-2}
  awk -v v="$1" -v lo="${body%%,*}" -v hi="${body##*,}" -v l="${interval:0:1}" -v r="${interval: -1}" 'BEGIN {
    v += 0
    if (lo != "" && !(l == "(" ? v > lo + 0 : v >= lo + 0)) exit 1
    if (hi != "" && !(r == ")" ? v < hi + 0 : v <= hi + 0)) exit 1 }'
}

port_taken() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

_check_number() { # NAME TYPE
  local name=$1 kind=${2%%:*} rest=${2#*:} value=${!1}
  if [[ $kind == int ]]; then
    local low=${rest%%:*} high=""
    if [[ $rest == *:* ]]; then high=${rest##*:}; fi
    local expected="an integer${low:+ >= $low}${high:+ and <= $high}" number
    if [[ ! $value =~ ^[+-]?[0-9]{1,15}$ ]]; then
      bad "$name" "$expected"
      return
    fi
    number=$((10#${value#[+-]}))
    if [[ $value == -* ]]; then number=$((-number)); fi
    if { [[ -n $low ]] && ((number < low)); } || { [[ -n $high ]] && ((number > high)); }; then bad "$name" "$expected"; fi
  elif ! _is_number "$value" || ! _in_interval "$value" "$rest"; then
    bad "$name" "a number in $rest"
  fi
}

_check_gpus() { # NAME: physical ids, comma separated, each once
  local name=$1 id seen=,
  if [[ ! ${!name} =~ ^[0-9]+(,[0-9]+)*$ ]]; then
    bad "$name" "GPU ids separated by commas, such as 0,1,2"
    return
  fi
  local -a ids
  IFS=, read -ra ids <<<"${!name}"
  for id in "${ids[@]}"; do
    if [[ $seen == *",$id,"* ]]; then
      bad "$name" "every GPU id once (id $id is there twice)"
      return
    fi
    seen+="$id,"
  done
}

_check_var() { # NAME: type check of the value that is set
  local name=$1 type=${_VAR_TYPE[$1]} value=${!1}
  if [[ $type == *\? ]]; then
    type=${type%\?}
    if [[ -z $value ]]; then return; fi
  fi
  case $type in
    str | list) if [[ -z $value ]]; then bad "$name" "a value (it is empty)"; fi ;;
    name) if [[ ! $value =~ ^[A-Za-z0-9._-]+$ ]]; then bad "$name" "letters, digits, dot, dash and underscore only"; fi ;;
    bool) if [[ $value != 0 && $value != 1 ]]; then bad "$name" "0 or 1"; fi ;;
    ratio)
      if ! _is_number "$value" || ! _in_interval "$value" "(0,1]"; then
        bad "$name" "a fraction in (0, 1], such as 0.10 for ten percent"
      fi
      ;;
    int:* | float:*) _check_number "$name" "$type" ;;
    choice:*) if [[ ,${type#choice:}, != *",$value,"* ]]; then bad "$name" "one of ${type#choice:}"; fi ;;
    dir) if [[ ! -d $value ]]; then bad "$name" "an existing directory${value:+ (there is none at that path)}"; fi ;;
    file) if [[ ! -f $value || ! -r $value ]]; then bad "$name" "a readable file${value:+ (there is none at that path)}"; fi ;;
    model) if [[ ! -f $value/config.json ]]; then bad "$name" "a Hugging Face model directory (with config.json)"; fi ;;
    out) _check_out "$name" ;;
    cmd) if ! command -v "$value" >/dev/null 2>&1; then bad "$name" "a program that can be run"; fi ;;
    gpus) _check_gpus "$name" ;;
    port)
      if [[ $value != auto ]]; then
        if [[ ! $value =~ ^[0-9]{1,5}$ ]] || ((10#$value < 1 || 10#$value > 65535)); then
          bad "$name" "auto or a port number from 1 to 65535"
        elif port_taken "$value"; then
          bad "$name" "a free port (something listens there already; auto chooses one)"
        fi
      fi
      ;;
    url) if [[ ! $value =~ ^https?://[^/]+ ]]; then bad "$name" "an address such as http://127.0.0.1:13141/generate"; fi ;;
    runs) if [[ ! $value =~ [^[:space:],] ]]; then bad "$name" "at least one entry such as teachability:0.10:20"; fi ;;
    *) die "$name is declared with an unknown type: $type" ;;
  esac
}

_check_out() { # NAME: the directory, or its nearest existing parent, must be writable
  local name=$1 path=${!1}
  if [[ -z $path ]]; then
    bad "$name" "a directory to write to"
    return
  fi
  if [[ -e $path && ! -d $path ]]; then
    bad "$name" "a directory (that path is a file)"
    return
  fi
  while [[ ! -e $path ]]; do path=$(dirname -- "$path"); done
  if [[ ! -d $path || ! -w $path ]]; then bad "$name" "a directory that can be made ($path is not writable)"; fi
}

stop_on_errors() { # every wrong variable at once
  local line
  if ((${#_VAR_ERRORS[@]} == 0)); then return; fi
  for line in "${_VAR_ERRORS[@]}"; do printf 'error: %s\n' "$line" >&2; done
  printf '%s\n' "nothing was started; --help lists the variables" >&2
  exit 2
}

load_variables() {
  local name
  for name in "${_VAR_NAMES[@]}"; do
    if [[ -n ${!name-} ]]; then
      _VAR_FROM[$name]=user
    elif [[ -n ${!name+set} && ${_VAR_TYPE[$name]} == *\? ]]; then
      _VAR_FROM[$name]=user # set to empty on purpose
    else
      _VAR_FROM[$name]=${_VAR_PRESET[$name]+preset}
      _expand "${_VAR_DEFAULT[$name]}"
      printf -v "$name" '%s' "$REPLY"
    fi
    case ${_VAR_TYPE[$name]%\?} in
      dir | file | model | out) if [[ ${!name} == -* ]]; then printf -v "$name" './%s' "${!name}"; fi ;; # a path, no option
    esac
    _check_var "$name"
  done
}

export_chosen() { # hand on what the user or this launcher chose; what is a plain default stays with the callee
  local name
  for name in "${_VAR_NAMES[@]}"; do
    if [[ -n ${_VAR_FROM[$name]} ]]; then export "${name?}"; fi
  done
}

flag_with_value() { # flag_with_value ARRAY FLAG VALUE: joined by = where the value would pass for an option
  local -n _words=$1
  if [[ $3 == -* ]]; then _words+=("$2=$3"); else _words+=("$2" "$3"); fi
}

flags_from_variables() { # FLAGS += the train.py flags of all variables that have one (MARK: "" or "@"); empty ones are left out
  local mark=${1-} name flag
  for name in "${_VAR_NAMES[@]}"; do
    flag=${_VAR_FLAG[$name]}
    if [[ -z $flag || -z ${!name} || ${flag%%--*} != "$mark" ]]; then continue; fi
    flag=${flag#@}
    case ${_VAR_TYPE[$name]%\?} in
      bool) if [[ ${!name} == 1 ]]; then FLAGS+=("$flag"); fi ;;
      list)
        local -a words
        read -ra words <<<"${!name}"
        FLAGS+=("$flag" "${words[@]}")
        ;;
      *) flag_with_value FLAGS "$flag" "${!name}" ;;
    esac
  done
}

_type_words() {
  local type=${1%\?}
  case $type in
    bool) REPLY="0 or 1" ;;
    int:*) REPLY="integer" ;;
    float:*) REPLY="number in ${type#float:}" ;;
    ratio) REPLY="fraction in (0,1]" ;;
    choice:*) REPLY=${type#choice:} && REPLY=${REPLY//,/ | } ;;
    out) REPLY="directory" ;;
    dir) REPLY="existing directory" ;;
    file) REPLY="existing file" ;;
    model) REPLY="model directory" ;;
    gpus) REPLY="GPU ids" ;;
    port) REPLY="port or auto" ;;
    runs) REPLY="entries" ;;
    cmd) REPLY="program" ;;
    url) REPLY="address" ;;
    *) REPLY="text" ;;
  esac
}

print_help() {
  local name shown="" bold="" plain=""
  if [[ -t 1 ]]; then bold=$'\e[1m' plain=$'\e[0m'; fi
  printf '%s\n\n' "$LAUNCHER_ABOUT"
  printf 'Usage: [NAME=value ...] bash %s [--help] [NAME=value ...] [-- more flags]\n' "$LAUNCHER_NAME"
  printf 'Settings are environment variables. DRY_RUN=1 prints the commands and starts nothing.\n'
  for name in "${_VAR_NAMES[@]}"; do
    if [[ ${_VAR_GROUP[$name]} != "$shown" ]]; then
      shown=${_VAR_GROUP[$name]}
      printf '\n%s%s%s\n' "$bold" "$shown" "$plain"
    fi
    _type_words "${_VAR_TYPE[$name]}"
    printf '  %-34s %s [%s]\n' "$name=${_VAR_DEFAULT[$name]}" "${_VAR_HELP[$name]}" "$REPLY"
  done
}

print_variables() { # for other programs: group, name, type, default, meaning, flag, "?" where an empty value is another than the default
  local name empty
  printf 'about\t%s\n' "$LAUNCHER_ABOUT"
  for name in "${_VAR_NAMES[@]}"; do
    _type_words "${_VAR_TYPE[$name]}"
    empty=${_VAR_TYPE[$name]##*[!?]}
    printf '%s\t%s\t%s\t%s\t%s\t%s\t%s\n' "${_VAR_GROUP[$name]}" "$name" "$REPLY" "${_VAR_DEFAULT[$name]}" \
      "${_VAR_HELP[$name]}" "${_VAR_FLAG[$name]#@}" "${_VAR_DEFAULT[$name]:+$empty}"
  done
}

_did_you_mean() { # "; did you mean NAME?" for the variable that is at most three letters away from $1, whatever its case; else nothing
  printf '%s\n' "${!_VAR_TYPE[@]}" | awk -v word="$1" '
    BEGIN { word = toupper(word); n = length(word); least = 4 }
    {
      m = length($0)
      for (j = 0; j <= m; j++) row[j] = j
      for (i = 1; i <= n; i++) {
        corner = row[0]; row[0] = i
        for (j = 1; j <= m; j++) {
          change = corner + (substr(word, i, 1) != substr($0, j, 1)); corner = row[j]
          if (row[j] + 1 < change) change = row[j] + 1
          if (row[j - 1] + 1 < change) change = row[j - 1] + 1
          row[j] = change
        }
      }
      if (row[m] < least || row[m] == least && $0 < best) { least = row[m]; best = $0 }
    }
    END { if (least <= 3 && least * 3 <= n) printf "; did you mean %s?", best }'
}

_warn_unknown() { # a misspelt OPD_..., ROLLOUT_... variable would silently do nothing
  local name
  if [[ -z ${_VAR_TYPE[OPD_PROFILE]+set} ]]; then return; fi # no launcher of training
  while IFS= read -r name; do
    if [[ $name =~ ^(OPD|ROLLOUT|NUM_ROLLOUT|TEACHER|STUDENT|ACTOR|SAVE|N_SAMPLES)_?[A-Z] && -z ${_VAR_TYPE[$name]+set} ]]; then
      printf 'warning: %s is set, but this launcher has no such variable (--help lists them)%s\n' "$name" "$(_did_you_mean "$name")" >&2
    fi
  done < <(compgen -e)
}

launcher_init() {
  while (($#)); do
    case $1 in
      -h | --help) print_help && exit 0 ;;
      --variables) print_variables && exit 0 ;;
      --)
        shift
        # shellcheck disable=SC2034
        PASS_THROUGH=("$@")
        break
        ;;
      [A-Za-z_]*=*)
        if [[ -z ${_VAR_TYPE[${1%%=*}]+set} ]]; then die "$1: this launcher has no variable ${1%%=*} (--help lists them)$(_did_you_mean "${1%%=*}")"; fi
        export "${1?}"
        ;;
      *) die "$1: expected NAME=value, --help, or -- followed by more train.py flags" ;;
    esac
    shift
  done
  _warn_unknown
  load_variables
  stop_on_errors
}
