#!/bin/sh
# As root, in this directory: install the agent as a service, or a new version of it beside running calls.
# Before the first time, write LIVEKIT_URL=, LIVEKIT_API_KEY= and LIVEKIT_API_SECRET= into /etc/lastcall/NAME.env,
# with the mode 0600. LASTCALL=PATH takes a lastcall that is installed already.
set -eu
name=${1:-agent}
home=/opt/$name
mkdir -p "$home"
cp agent.py lastcall.toml requirements.txt "$home"
lastcall=${LASTCALL:-$home/.venv/bin/lastcall}
if [ -z "${LASTCALL:-}" ]; then
    [ -d "$home/.venv" ] || python3 -m venv "$home/.venv"
    "$home/.venv/bin/pip" install --quiet -r "$home/requirements.txt"
fi
cd "$home"
"$lastcall" unit systemd "$home/agent.py" --name "$name" --exec "$lastcall" >"/etc/systemd/system/$name.service"
systemctl daemon-reload
if systemctl is-active --quiet "$name"; then
    systemctl reload "$name" # a new worker starts beside the old one, and calls go on
else
    systemctl enable --now "$name" # returns when the worker is registered with the LiveKit server
fi
