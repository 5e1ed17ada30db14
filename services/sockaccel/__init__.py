"""Socket acceleration: connections within one machine that skip the TCP/IP stack."""
