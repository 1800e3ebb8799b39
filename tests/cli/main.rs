//! The program as a person runs it, from the command line: `cargo test -p gradtx-tests --test cli pipeline`
//! runs one of the modules.

mod artifacts;
mod bench;
mod bit_flips;
mod clients;
mod command_line;
mod corrupt;
mod cross_validation;
mod data_forms;
mod device_auto;
mod edge;
mod emulate;
mod emulator_inputs;
mod foreign_models;
mod frozen_a;
mod home;
mod multiple_choice;
mod own_models;
mod packaging;
mod pipeline;
mod plan;
mod privacy;
mod product_targets;
mod products;
mod prompts;
mod recipes;
mod refine;
mod report;
mod run_directory;
mod settings_bounds;
mod split;
mod submit;
mod surface;
mod sweeps;
mod two_hosts;
mod using;
