//! How a source packs pages: the flags of all methods that the engine has.

use std::str::FromStr;

use clap::{Arg, ArgMatches, Args, Command, Error, FromArgMatches};
use multifd::{Level, Method, SendOptions};

use super::shared::number;

/// `--multifd-compression`, and for each method that has a level `--multifd-NAME-level`.
#[derive(Clone, Debug)]
pub(crate) struct CompressionArgs {
    method: Method,
    levels: Vec<(Method, u8)>,
}

impl CompressionArgs {
    /// Whether pages are packed at all.
    pub(crate) fn packs(&self) -> bool {
        self.method != Method::None
    }

    /// The name of the method.
    pub(crate) fn name(&self) -> &'static str {
        self.method.as_str()
    }

    pub(crate) fn apply(&self, options: SendOptions) -> SendOptions {
        let options = options.method(self.method);
        self.levels.iter().fold(options, |options, (method, level)| options.level(*method, *level))
    }
}

impl Args for CompressionArgs {
    fn augment_args(command: Command) -> Command {
        let help = format!(
            "Compression method: {}; must equal the multifd-compression of the destination",
            Method::names()
        );
        let method = Arg::new(METHOD)
            .long(METHOD)
            .value_name("METHOD")
            .default_value(Method::None.as_str())
            .value_parser(Method::from_str)
            .help(help);
        leveled().fold(command.arg(method), |command, (method, level)| {
            let parameter = level.parameter;
            command.arg(
                Arg::new(parameter.name)
                    .long(parameter.name)
                    .value_name("LEVEL")
                    .default_value(parameter.default.to_string())
                    .value_parser(number::<u64>(parameter.least, parameter.most))
                    .help(format!("{method} level, {}", level.meaning)),
            )
        })
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for CompressionArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, Error> {
        let method = matches.get_one(METHOD).copied().unwrap_or_default();
        let given = |level: Level| {
            let given = matches.get_one(level.parameter.name).copied().unwrap_or(level.parameter.default);
            u8::try_from(given).unwrap_or(u8::MAX)
        };
        Ok(Self { method, levels: leveled().map(|(method, level)| (method, given(level))).collect() })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

fn leveled() -> impl Iterator<Item = (Method, Level)> {
    Method::ALL.iter().filter_map(|method| Some((*method, method.level()?)))
}

const METHOD: &str = "multifd-compression";
