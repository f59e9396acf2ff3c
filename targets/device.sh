#!/bin/sh
# What runs on a device: POSIX sh and its tools, no Python. One verb a call:
#
#   probe                                   what the device is and in which state, in sections
#   clock                                   seconds by its clock
#   lock CLIENT STALE_S OWNER...            take the device; exit 75 and print who has it
#   unlock CLIENT
#   have FILE | append FILE | seal FILE SHA256 | fetch FILE...
#   start JOB WAIT_S LIMIT_S CLOCKS MODE WORK COMMAND...    begin a command that outlives the connection
#   state JOB | wait_for JOB WAIT_S | stop JOB
#   restore                                 put back the power state that a killed job left
#   tidy FOLDER                             remove a folder of runs/ or engines/
#
# Files and jobs are named from the folder that everything lives in. A job notes the power state, changes it where
# asked, runs its command under a limit, and puts the state back whatever ends it; only then it writes its exit code.
# Exit codes: 64 usage, 65 another hash, 69 something is missing, 70 the state could not be put back, 73 cannot write,
# 75 somebody else has the device.
set -u
umask 077
LC_ALL=C
export LC_ALL
base=$HOME/.cache/fusepress
self=$base/bin/${0##*/}
root=${FUSEPRESS_DEVICE_ROOT:-} # in place of / for /proc, /sys and /etc
alive_s=30

fail() {
  code=$1
  shift
  printf '%s\n' "$*" >&2
  exit "$code"
}

inside() { # the name stays in our folder and needs no quoting
  case $1 in
  '' | /* | *..* | *[!A-Za-z0-9._/-]*) fail 64 "not a name of ours: $1" ;;
  esac
}

privileged() {
  if [ "$(id -u)" = 0 ]; then "$@" </dev/null; else sudo -n "$@" </dev/null; fi
}

now() { date +%s; }

lives() { # whether a process is there and no mere entry that nobody has collected
  kill -0 "$1" 2>/dev/null || return 1
  case $(ps -o stat= -p "$1" 2>/dev/null) in
  Z*) return 1 ;;
  esac
}

clock() { now; }

# ------------------------------------------------------------------------------------------------------------- probe

section() { printf '\n== %s\n' "$1"; }

first() { [ -r "$1" ] && head -n 1 "$1" 2>/dev/null; }

program() { # its path from /, for jobs run elsewhere
  if [ -z "$1" ] || [ ! -f "$1" ] || [ ! -x "$1" ]; then return 1; fi
  case $1 in
  /*) printf '%s\n' "$1" ;;
  *) printf '%s/%s\n' "$PWD" "$1" ;;
  esac
}

trtexec_path() {
  if [ -n "${TRTEXEC:-}" ]; then # what was named is taken, or nothing
    program "$TRTEXEC" || program "$(command -v "$TRTEXEC" 2>/dev/null)"
    return
  fi
  for found in "$(command -v trtexec 2>/dev/null)" /usr/src/tensorrt/bin/trtexec /opt/tensorrt/bin/trtexec; do
    program "$found" && return
  done
  return 1
}

power_mode() {
  command -v nvpmodel >/dev/null 2>&1 || return 1
  nvpmodel -q 2>/dev/null </dev/null || privileged nvpmodel -q 2>/dev/null
}

power_state() {
  section power
  power_mode
  section clocks
  if command -v jetson_clocks >/dev/null 2>&1; then privileged jetson_clocks --show 2>/dev/null; fi
  section thermal
  for zone in "$root"/sys/class/thermal/thermal_zone*; do
    celsius=$(first "$zone/temp") && printf '%s %s\n' "$celsius" "$(first "$zone/type")"
  done
  section events
  for count in "$root"/sys/class/hwmon/hwmon*/oc*_event_cnt; do
    value=$(first "$count") && printf '%s %s\n' "$value" "${count##*/}"
  done
  section gpu
  for gpu in "$root"/sys/class/devfreq/*gpu* "$root"/sys/class/devfreq/*.g[apv]*b; do
    value=$(first "$gpu/cur_freq") && printf 'cur=%s min=%s max=%s\n' \
      "$value" "$(first "$gpu/min_freq")" "$(first "$gpu/max_freq")"
  done
  section nvidia-smi
  if command -v nvidia-smi >/dev/null 2>&1; then
    nvidia-smi --query-gpu=name,compute_cap,driver_version,clocks.sm,clocks.max.sm,temperature.gpu,clocks_throttle_reasons.active \
      --format=csv,noheader,nounits 2>/dev/null </dev/null | grep -v 'N/A'
  fi
  section load
  first "$root/proc/loadavg"
  section time
  now
}

gpu_users() {
  for process in "$root"/proc/[0-9]*; do
    # shellcheck disable=SC2010  # names of descriptors are numbers
    if ls -l "$process/fd" 2>/dev/null | grep -Eq '/dev/(nvhost-gpu|nvgpu/|nvmap|nvidia[0-9])'; then
      printf '%s %s\n' "${process##*/}" "$(first "$process/comm")"
    fi
  done
}

probe() {
  mkdir -p "$base" || fail 73 "cannot make a folder in $HOME"
  section system
  uname -sm
  section model
  if [ -r "$root/proc/device-tree/model" ]; then tr -d '\000' <"$root/proc/device-tree/model"; fi
  section release
  first "$root/etc/nv_tegra_release"
  section packages
  if command -v dpkg-query >/dev/null 2>&1; then
    dpkg-query -W -f '${Package} ${Version}\n' nvidia-jetpack tensorrt 'libnvinfer[0-9]*' libnvinfer-bin 2>/dev/null
  fi
  section trtexec
  if trtexec=$(trtexec_path); then
    printf '%s\n' "$trtexec"
    section banner
    "$trtexec" --help 2>&1 </dev/null | head -n 3
  fi
  section cuda
  if [ -r "$root/usr/local/cuda/version.json" ]; then grep -A 3 '"cuda"' "$root/usr/local/cuda/version.json"; fi
  section modes
  if [ -r "$root/etc/nvpmodel.conf" ]; then grep '^< *POWER_MODEL' "$root/etc/nvpmodel.conf"; fi
  section sudo
  if privileged true 2>/dev/null; then echo yes; else echo no; fi
  section memory
  if [ -r "$root/proc/meminfo" ]; then grep -E '^(MemTotal|MemAvailable):' "$root/proc/meminfo"; fi
  section disk
  df -Pk "$base" 2>/dev/null | tail -n 1
  section users
  gpu_users
  section leftover
  if [ -e "$base/power/armed" ]; then echo yes; fi
  power_state
}

# -------------------------------------------------------------------------------------------------------------- lock

write_lock() { # CLIENT OWNER...
  held=$1
  shift
  printf '%s\n' "$held" >"$base/lock/client" && printf '%s\n' "$*" >"$base/lock/owner" && now >"$base/lock/beat"
}

lock_age() {
  last=$(cat "$base/lock/beat" 2>/dev/null) || last=
  if [ -z "$last" ]; then # made this moment, or never finished
    sleep 1
    last=$(cat "$base/lock/beat" 2>/dev/null) || last=0
  fi
  echo $(($(now) - ${last:-0}))
}

lock() {
  client=$1 stale=$2
  shift 2
  mkdir -p "$base" || fail 73 "cannot make a folder in $HOME"
  if ! mkdir "$base/lock" 2>/dev/null && [ "$(cat "$base/lock/client" 2>/dev/null)" != "$client" ]; then
    age=$(lock_age)
    [ "$age" -gt "$stale" ] || fail 75 "$(cat "$base/lock/owner" 2>/dev/null), last heard of $age s ago"
    # two that both find it stale: one of them makes this folder
    find "$base/lock.taken" -prune -mtime +0 -exec rmdir {} \; 2>/dev/null
    mkdir "$base/lock.taken" 2>/dev/null || fail 75 "another user, who takes over a stale lock"
    if [ "$(lock_age)" -gt "$stale" ]; then rm -rf "$base/lock"; fi
    mkdir "$base/lock" 2>/dev/null
    made=$?
    [ "$made" = 0 ] && write_lock "$client" "$@"
    rmdir "$base/lock.taken"
    [ "$made" = 0 ] || fail 75 "another user, who was faster"
  fi
  write_lock "$client" "$@" || fail 73 "cannot write the lock"
}

unlock() {
  if [ "$(cat "$base/lock/client" 2>/dev/null)" = "$1" ]; then rm -rf "$base/lock"; fi
}

# ------------------------------------------------------------------------------------------------------------- files

hash_of() {
  if command -v sha256sum >/dev/null 2>&1; then
    sha256sum <"$1"
  elif command -v shasum >/dev/null 2>&1; then
    shasum -a 256 <"$1"
  else
    openssl dgst -sha256 -r <"$1"
  fi | cut -d ' ' -f 1
}

have() { # the hash of a file, - where there is none, and how much of its copy has come
  inside "$1"
  if [ -f "$base/$1" ]; then known=$(hash_of "$base/$1"); else known=-; fi
  if [ -f "$base/$1.part" ]; then echo "$known $(($(wc -c <"$base/$1.part")))"; else echo "$known 0"; fi
}

append() {
  inside "$1"
  mkdir -p "$base/$(dirname "$1")" || fail 73 "cannot make a folder in $base"
  cat >>"$base/$1.part" || fail 73 "cannot write $1"
  if [ -d "$base/lock" ]; then now >"$base/lock/beat"; fi
}

seal() { # once more where it was sealed and nobody heard of it
  inside "$1"
  if [ ! -f "$base/$1.part" ] && [ -f "$base/$1" ] && [ "$(hash_of "$base/$1")" = "$2" ]; then return 0; fi
  found=$(hash_of "$base/$1.part")
  if [ "$found" != "$2" ]; then
    rm -f "$base/$1.part"
    fail 65 "the copy has the hash $found"
  fi
  mv "$base/$1.part" "$base/$1" || fail 73 "cannot write $1"
}

fetch() { # each file after a line with its size and hash; -1 where there is none
  for each; do
    inside "$each"
    if [ -f "$base/$each" ]; then
      printf '\n== %s %s %s\n' "$each" "$(($(wc -c <"$base/$each")))" "$(hash_of "$base/$each")"
      cat "$base/$each"
    else
      printf '\n== %s -1 -\n' "$each"
    fi
  done
}

tidy() {
  inside "$1"
  case $1 in
  runs/?* | engines/?*) rm -rf "${base:?}/$1" ;;
  *) fail 64 "only runs and engines are removed" ;;
  esac
}

# ------------------------------------------------------------------------------------------------------------- power

mode_id() { power_mode | grep -E '^[0-9]+$' | tail -n 1; }

set_power() { # CLOCKS MODE
  if [ "$1" = 0 ] && [ "$2" = - ]; then return 0; fi
  privileged true 2>/dev/null || return 0
  if [ ! -e "$base/power/armed" ]; then
    rm -rf "$base/power"
    mkdir -p "$base/power" || return 0
    mode_id >"$base/power/mode"
    if [ "$1" = 1 ]; then privileged jetson_clocks --store "$base/power/clocks" >/dev/null 2>&1 || rm -f "$base/power/clocks"; fi
    : >"$base/power/armed" # what is changed from here on is put back, by the next call too
  fi
  printf '%s\n' "$dir" >"$base/power/job"
  # a mode that cannot be read could not be put back
  if [ "$2" != - ] && [ -s "$base/power/mode" ]; then privileged nvpmodel -m "$2" >/dev/null 2>&1; fi
  if [ "$1" = 1 ] && [ -e "$base/power/clocks" ]; then privileged jetson_clocks >/dev/null 2>&1 && : >"$dir/locked"; fi
  return 0
}

restore() {
  [ -e "$base/power/armed" ] || return 0
  wanted=$(cat "$base/power/mode" 2>/dev/null)
  if [ -n "$wanted" ] && [ "$(mode_id)" != "$wanted" ]; then
    privileged nvpmodel -m "$wanted" >/dev/null 2>&1
    [ "$(mode_id)" = "$wanted" ] || return 1
  fi
  if [ -e "$base/power/clocks" ]; then
    privileged jetson_clocks --restore "$base/power/clocks" >/dev/null 2>&1 || return 1
  fi
  rm -rf "$base/power"
}

restore_unless_running() { # a job that lives puts the state back itself
  owner=$(cat "$base/power/job" 2>/dev/null)
  if [ -n "$owner" ] && fresh "$owner" && lives "$(cat "$owner/pid")"; then return 0; fi
  restore || fail 70 "the power state could not be put back: run sudo nvpmodel -m $(cat "$base/power/mode"), and restart"
}

# -------------------------------------------------------------------------------------------------------------- jobs

fresh() { # whether a job's folder is one of a job that lives
  [ ! -f "$1/rc" ] && [ -f "$1/alive" ] || return 1
  last=$(cat "$1/alive")
  [ $(($(now) - ${last:-0})) -le "$alive_s" ]
}

state() {
  inside "$1"
  dir=$base/$1
  if [ -f "$dir/rc" ]; then
    echo "done $(cat "$dir/rc")"
  elif fresh "$dir"; then
    echo running
  elif [ -f "$dir/alive" ]; then
    echo lost
  else
    echo none
  fi
}

wait_for() { # the state as soon as the job is done, or after a while
  left=$(($2 * 5))
  while [ "$left" -gt 0 ] && [ ! -f "$base/$1/rc" ]; do
    if sleep 0.2 2>/dev/null; then left=$((left - 1)); else sleep 1; left=$((left - 5)); fi
  done
  state "$1"
}

start() {
  inside "$1"
  patience=$2
  found=$(state "$1")
  case $found in
  done*)
    echo "$found"
    return
    ;;
  running)
    wait_for "$1" "$patience"
    return
    ;;
  esac
  dir=$base/$1
  orphan=$(cat "$dir/child" 2>/dev/null) # of a job that died with its watchdog; a number may have been given again
  if [ -n "$orphan" ] && ps -o args= -p "$orphan" 2>/dev/null | grep -q 'Engine='; then end KILL "$orphan"; fi
  rm -rf "$dir"
  mkdir -p "$dir" && now >"$dir/alive" || fail 73 "cannot write $1"
  name=$1
  shift 2
  if command -v setsid >/dev/null 2>&1; then
    setsid nohup sh "$self" job "$name" "$@" </dev/null >"$dir/job.log" 2>&1 &
  else
    nohup sh "$self" job "$name" "$@" </dev/null >"$dir/job.log" 2>&1 &
  fi
  wait_for "$name" "$patience"
}

stop() {
  inside "$1"
  [ "$(state "$1")" = running ] || return 0
  kill -TERM "$(cat "$base/$1/pid")" 2>/dev/null
  left=20
  while [ "$left" -gt 0 ] && [ ! -f "$base/$1/rc" ]; do
    sleep 1
    left=$((left - 1))
  done
}

end() { # a command with everything that it started
  kill "-$1" "-$2" 2>/dev/null || kill "-$1" "$2" 2>/dev/null
}

watchdog() { # says that the job lives, ends its command at the limit, and stands in for a job that was killed
  while :; do
    if ! lives $$; then
      watch=''
      finish 137
    fi
    now >"$dir/alive"
    if [ -d "$base/lock" ]; then now >"$base/lock/beat"; fi
    if [ "$(now)" -ge "$deadline" ]; then
      : >"$dir/late"
      end TERM "$child"
      sleep 5
      end KILL "$child"
      return
    fi
    sleep 1
  done
}

finish() { # EXIT_CODE
  trap '' TERM HUP INT
  for each in $watch $sampler; do kill "$each" 2>/dev/null; done
  if [ -n "$child" ]; then
    end TERM "$child"
    if lives "$child"; then
      sleep 1
      end KILL "$child"
    fi
  fi
  power_state >"$dir/after" 2>/dev/null
  restore || : >"$dir/unrestored"
  rm -f "$dir/alive"
  printf '%s\n' "$1" >"$dir/rc.part" && mv "$dir/rc.part" "$dir/rc"
  exit "$1"
}

sample() { # the state while the command runs
  if command -v tegrastats >/dev/null 2>&1; then
    exec tegrastats --interval 500
  elif command -v nvidia-smi >/dev/null 2>&1; then
    exec nvidia-smi --query-gpu=clocks.sm,temperature.gpu,power.draw,utilization.gpu --format=csv,noheader,nounits -lms 500
  fi
}

job() { # JOB LIMIT_S CLOCKS MODE WORK COMMAND...
  inside "$1"
  inside "$5"
  dir=$base/$1 deadline=$(($(now) + $2)) clocks=$3 mode=$4 work=$base/$5
  child='' watch='' sampler=''
  shift 5
  trap 'finish 143' TERM HUP INT
  echo $$ >"$dir/pid"
  power_state >"$dir/before" 2>/dev/null
  set_power "$clocks" "$mode"
  sample >"$dir/samples" 2>/dev/null </dev/null &
  sampler=$!
  mkdir -p "$work"
  cd "$work" || finish 73
  if command -v setsid >/dev/null 2>&1; then
    setsid "$@" >"$dir/log" 2>&1 </dev/null &
  else
    "$@" >"$dir/log" 2>&1 </dev/null &
  fi
  child=$!
  echo "$child" >"$dir/child"
  watchdog >/dev/null 2>&1 &
  watch=$!
  wait "$child"
  finish $?
}

[ $# -gt 0 ] || fail 64 "expected a verb"
verb=$1
shift
# what a login shell prints by itself comes before this line
[ "$verb" = job ] || echo '== fusepress'
case $verb in
probe | clock | lock | unlock | have | append | seal | fetch | tidy | start | state | wait_for | stop | job) "$verb" "$@" ;;
restore) restore_unless_running ;;
*) fail 64 "no such verb: $verb" ;;
esac
