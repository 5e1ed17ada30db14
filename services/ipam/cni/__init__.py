"""CNI: the plugin a container runtime executes, the server behind it, and their installation."""
