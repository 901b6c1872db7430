# What scenarios share. Sourced with: . "$LAB/lib.sh"
#
# Given by the lab: LAB (this directory), LAB_GUEST (the test guest's files), LAB_TINY (the smallest guest), KVASIR,
# QEMU and XTASK (programs). $work is a directory for the scenario's files.

work=$(mktemp -d) || exit
trap 'rm -rf "$work"' EXIT

checks=0
failures=0

# pass NAME, fail NAME [WHY]: notes the outcome of one check.
pass() {
    checks=$((checks + 1))
    echo "PASS $1"
}

fail() {
    checks=$((checks + 1))
    failures=$((failures + 1))
    echo "FAIL $*"
}

# finish: ends the scenario; its status is 0 if there were checks and all of them passed.
finish() {
    echo "$((checks - failures)) of $checks checks passed"
    [ "$checks" -gt 0 ] && [ "$failures" -eq 0 ]
    exit
}

# expect NAME STATUS PATTERN COMMAND...: runs a command, whose standard input is empty, for at most $limit seconds
# (60 if unset); passes if it ends with STATUS and printed a line that matches PATTERN (a basic regular expression).
# The output is left in $output.
output=$work/output
expect() {
    name=$1 status=$2 pattern=$3
    shift 3
    timeout "${limit:-60}" "$@" </dev/null >"$output" 2>&1
    got=$?
    if [ "$got" -ne "$status" ]; then
        tail -n 30 "$output" | sed 's/^/    /'
        fail "$name" "(status $got, not $status)"
    elif ! grep -q -e "$pattern" "$output"; then
        tail -n 30 "$output" | sed 's/^/    /'
        fail "$name" "(no line $pattern)"
    else
        pass "$name"
    fi
}

# figure NAME WORDS: the value of NAME=VALUE in the words.
figure() {
    for word in $2; do
        case $word in
        "$1"=*) echo "${word#*=}" ;;
        esac
    done
}
