#!/bin/sh
# For a pipeline, in the directory of agent.py: fails when a stop would cut a call. Needs no LiveKit server.
set -eu
python3 -m venv .rehearsal
.rehearsal/bin/pip install --quiet -r requirements.txt
exec .rehearsal/bin/lastcall rehearse agent.py --junit rehearsal.xml
