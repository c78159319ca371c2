"""The worker side of lastcall: hosts one AgentServer and ends it without cutting a job."""
