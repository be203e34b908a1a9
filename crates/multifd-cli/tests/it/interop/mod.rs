//! Real QEMUs at both ends, the program between them.

mod files;
mod matrix;
mod peers;
mod refused;
