"""What each kind of message leaks to the attacks of `attacks`."""
