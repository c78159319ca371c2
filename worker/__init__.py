"""The worker's side: hosts one AgentServer, and ends it without cutting a job."""
