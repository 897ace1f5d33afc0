# shellcheck shell=bash
# Which nodes a run has. Names are looked up once, here: Ray wants addresses, and a name may mean another one elsewhere. Sourced by
# launch.sh.

WORKER_ADDRESSES=()
NODES_ARE_KNOWN=""

# MASTER_ADDR as an address, and the other nodes of HOSTFILE: first column, without comments, this node and repetitions.
find_nodes() {
    [[ -z $NODES_ARE_KNOWN ]] || return 0
    NODES_ARE_KNOWN=1
    local found
    found=$("$PYTHON" -I -S - "${MASTER_ADDR:-127.0.0.1}" "${HOSTFILE:-}" <<'PY'
import ipaddress, re, socket, sys

def address(name):
    """IPv4 where there is one. Exits with a line that names what cannot be looked up."""
    try:
        if re.fullmatch(r"[0-9.]+", name):
            ipaddress.ip_address(name)  # the look-up takes 10.0.2 and 10.0.0.02 too, for addresses that nobody meant
        found = {row[0]: row[4][0] for row in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)}
    except (OSError, ValueError) as error:
        unknown.append(f"{name} ({error.args[-1]})")
        return ""
    return found.get(socket.AF_INET) or next(iter(found.values()))

unknown = []
master, hostfile = sys.argv[1:]
here = address(master)
names = []
if hostfile:
    try:
        with open(hostfile, encoding="utf-8-sig") as lines:
            names = [words[0] for line in lines if (words := line.split("#")[0].split())]
    except UnicodeError:
        print("it is no UTF-8 text; give a text file, one node address per line")
        sys.exit(1)
others = {}
for name in names:
    found = address(name)
    # The name of this machine is often written down as a loopback address.
    if found and found != here and not (found.startswith("127.") and name not in (found, "localhost")):
        others.setdefault(found)
if unknown:
    print("no address is known for", ", ".join(unknown))
    sys.exit(1)
if others and here.startswith("127.") and not all(one.startswith("127.") for one in others):
    print(f"MASTER_ADDR={master} is {here} here, where no other node can reach it; give this node's address in the cluster network")
    sys.exit(1)
def is_no_node(text):
    found = ipaddress.ip_address(text.split("%")[0])
    return found.is_unspecified or found.is_multicast or found.is_loopback and not here.startswith("127.")

if nobody := list(filter(is_no_node, others)):
    print(f"{', '.join(nobody)} is no other node's address; give each node's own in the cluster network")
    sys.exit(1)
print(here, *others)
PY
    ) || die "${HOSTFILE:+HOSTFILE=$HOSTFILE: }$found"
    read -ra WORKER_ADDRESSES <<<"$found"
    export MASTER_ADDR="${WORKER_ADDRESSES[0]}"
    WORKER_ADDRESSES=("${WORKER_ADDRESSES[@]:1}")
}

check_hostfile() { # NODES-WANTED
    [[ $REHEARSE != 1 ]] || return 0
    [[ -z ${HOSTFILE:-} || -f $HOSTFILE && -r $HOSTFILE ]] || die "HOSTFILE=$HOSTFILE cannot be read: give a file with one node address per line"
    find_nodes
    if [[ -z ${HOSTFILE:-} ]]; then
        [[ $1 -le 1 ]] || say "HOSTFILE is not set: join the other $(($1 - 1)) nodes by hand with the command printed below"
        return 0
    fi
    local found=$((${#WORKER_ADDRESSES[@]} + 1))
    ((found == $1)) || die "HOSTFILE=$HOSTFILE names $found nodes (this one, ${MASTER_ADDR}, included), the recipe needs $1"
}

# What goes between the cluster's own nodes goes through no proxy, whatever the shell says.
spare_nodes_from_proxy() {
    local address known=${no_proxy:-${NO_PROXY:-}}
    for address in localhost 127.0.0.1 "$MASTER_ADDR" "${WORKER_ADDRESSES[@]}"; do
        [[ ,$known, == *",$address,"* ]] || known="${known:+$known,}$address"
    done
    export no_proxy="$known" NO_PROXY="$known"
}
