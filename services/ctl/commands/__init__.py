"""One module a command or group of `fibril`. Nothing heavy is imported here at module level: `fibril
--help` is quick."""
