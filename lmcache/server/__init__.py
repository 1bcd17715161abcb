"""The standalone store that several engines share: its protocol, its server and its client."""
