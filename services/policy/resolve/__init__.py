"""From rules to tables: which peers a policy treats alike, and what it says of each kind on each port."""
