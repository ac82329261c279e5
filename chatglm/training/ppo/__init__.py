"""The stage `ppo`: a policy and a value head, rollouts, rewards, advantages, and the loop."""
