//! `docs/use/parameters.md` checked against the command line and the library's options.

use std::collections::BTreeSet;

use multifd::{ReceiveOptions, SendOptions, live::MigrateOptions};
use serde_json::{Value, json};

use crate::{
    kit::run,
    table::{Parameter, Place, parameters, rows},
};

/// Whether a verb accepts this value: then it prints its help.
fn judged(verb: &str, name: &str, value: &str) -> bool {
    let ended = run([verb, &format!("--{name}={value}"), "--help"]);
    match ended.code {
        Some(0) => true,
        Some(2) => {
            assert!(ended.stderr.contains(name), "{ended:?}");
            false
        }
        _ => panic!("{ended:?}"),
    }
}

#[test]
fn command_line_takes_and_refuses_what_the_table_says() {
    for Parameter { name, command_line, .. } in parameters() {
        for Place { name: verb, range, .. } in command_line {
            let (taken, refused) = range.samples();
            for value in taken {
                assert!(judged(&verb, &name, &value), "{verb} --{name} {value} is refused");
            }
            for value in refused {
                assert!(!judged(&verb, &name, &value), "{verb} --{name} {value} is taken");
            }
        }
    }
}

/// The part of a verb's help about one flag.
fn help_of(help: &str, name: &str) -> String {
    let mut lines = help.lines().skip_while(|line| !line.trim_start().starts_with(&format!("--{name} ")));
    let first = lines.next().unwrap_or_default().to_owned();
    let rest =
        lines.take_while(|line| !line.trim_start().starts_with('-') || line.trim_start().starts_with("- "));
    first + &rest.collect::<Vec<_>>().join(" ")
}

#[test]
fn command_line_has_the_defaults_of_the_table() {
    for Parameter { name, command_line, .. } in parameters() {
        for Place { name: verb, default, .. } in command_line {
            let help = help_of(&run([verb.as_str(), "--help"]).stdout, &name);
            assert!(!help.is_empty(), "{verb} has no --{name}");
            if default.is_empty() {
                assert!(!help.contains("[default: "), "{verb}: {help}");
            } else {
                assert!(help.contains(&format!("[default: {default}]")), "{verb}: {default}: {help}");
            }
        }
    }
}

#[test]
fn every_flag_with_a_parameters_name_is_in_the_table() {
    let listed: BTreeSet<_> = parameters()
        .iter()
        .flat_map(|row| row.command_line.iter().map(|place| (place.name.clone(), row.name.clone())))
        .collect();
    let capabilities: Vec<_> = [rows("## Capabilities that apply"), rows("## Switches")].concat();
    let limits = rows("## Limits");
    let of_ours = [
        "json",
        "quiet",
        "help",
        "uuid",
        "sync-mode",
        "force",
        "suppress-vmdesc",
        "size",
        "dirty-rate",
        "channels-from",
        "channels-may-break",
        "missing-pages",
        "progress",
        "listen",
        "no-return-path",
        "before-continue",
        "leave-paused",
        "quit",
        "paused",
        "metrics",
        "no-verify",
        "label",
        "base",
        "control",
        "dir",
        "name",
        "jobs",
        "resume",
        "retry",
        "no-working-set",
        "record-working-set",
        "host-page-size",
    ];
    for verb in ["send", "receive", "demo", "capture", "restore"] {
        let help = run([verb, "--help"]).stdout;
        let flags = help.lines().filter_map(|line| {
            let line = line.trim_start();
            let line = line.strip_prefix("-q, ").or(line.strip_prefix("-h, ")).unwrap_or(line);
            line.strip_prefix("--")?.split([' ', '.', '[']).next().map(str::to_owned)
        });
        for flag in flags.filter(|flag| !of_ours.contains(&flag.as_str())) {
            let named = capabilities
                .iter()
                .any(|row| row[0] == format!("`{flag}`") && row[2].contains(&format!("--{flag}")));
            let limit = limits.iter().any(|row| {
                row[0].starts_with(&format!("`{flag}`")) && row[2].contains(&format!("`{verb} --{flag}`"))
            });
            assert!(
                named || limit || listed.contains(&(verb.to_owned(), flag.clone())),
                "{verb} --{flag} is not in the table"
            );
        }
    }
}

/// The options with this name, converted from data and back.
fn options(name: &str, settings: Value) -> Result<Value, String> {
    fn through<T: serde::de::DeserializeOwned + serde::Serialize>(settings: Value) -> Result<Value, String> {
        let options: T = serde_json::from_value(settings).map_err(|error| error.to_string())?;
        Ok(serde_json::to_value(options).expect("written"))
    }
    match name {
        "SendOptions" => through::<SendOptions>(settings),
        "ReceiveOptions" => through::<ReceiveOptions>(settings),
        "MigrateOptions" => through::<MigrateOptions>(settings),
        _ => panic!("no options of the name {name}"),
    }
}

/// A number if possible.
fn value(text: &str) -> Value {
    let number = text.parse::<u64>().map(Value::from).or_else(|_| text.parse::<i64>().map(Value::from));
    number.unwrap_or_else(|_| text.into())
}

#[test]
fn library_has_ranges_and_defaults_of_the_table() {
    for Parameter { name, library, .. } in parameters() {
        for Place { name: place, default, range } in library {
            let defaults = options(&place, json!({})).expect("defaults");
            assert_eq!(defaults[&name], value(&default), "{place} {name}");
            let (taken, refused) = range.samples();
            for text in taken {
                let read = options(&place, json!({ name.as_str(): value(&text) })).expect(&text);
                assert_eq!(read[&name], value(&text), "{place} {name}");
            }
            for text in refused {
                let error = options(&place, json!({ name.as_str(): value(&text) })).expect_err(&text);
                // What exceeds 64 bits is not a number at all.
                assert!(error.contains(&name) || text.len() > 19, "{place}: {error}");
            }
        }
    }
}

#[test]
fn every_field_that_is_a_parameter_is_in_the_table() {
    let of_ours = ["uuid", "look-for-zero-pages", "channels-from", "resume-if-unknown", "postcopy"];
    let limits = rows("## Limits");
    let parameters = parameters();
    let capabilities = [rows("## Capabilities that apply"), rows("## Switches")].concat();
    for place in ["SendOptions", "ReceiveOptions", "MigrateOptions"] {
        let defaults = options(place, json!({})).expect("defaults");
        for field in
            defaults.as_object().expect("fields").keys().filter(|field| !of_ours.contains(&field.as_str()))
        {
            let setter = format!("{place}::{}", field.replace('-', "_"));
            if capabilities.iter().any(|row| row[0] == format!("`{field}`") && row[2].contains(&setter)) {
                continue;
            }
            if limits.iter().any(|row| row[0].starts_with(&format!("`{field}`")) && row[3].contains(place)) {
                continue;
            }
            let row = parameters.iter().find(|row| row.name == *field);
            let row = row.unwrap_or_else(|| panic!("{place}: {field} is not in the table"));
            assert!(row.library.iter().any(|other| other.name == place), "{place}: {field}: {row:?}");
        }
    }
}

/// A default or a range that is QEMU's is written without brackets, any other in brackets.
#[test]
fn brackets_stand_where_qemu_differs() {
    for row in rows("## Parameters that apply") {
        for place in
            row[5].split(';').chain(row[6].split(';')).map(str::trim).filter(|place| !place.is_empty())
        {
            let default = place.split(' ').nth(1).unwrap_or_default();
            assert_eq!(
                default.starts_with('('),
                default != row[4] && !default.is_empty(),
                "{place} of {}",
                row[0]
            );
        }
    }
}

#[test]
fn combinations_end_as_the_table_says() {
    let at = ["no/such/machine", "tcp:127.0.0.1:1"];
    let send = |flags: &[&str], at: [&str; 2]| run([&["send"], flags, &at].concat()).code;
    let receive = |flags: &[&str]| {
        run([&["receive"], flags, &["tcp:127.0.0.1:0", "no/such/folder/machine"]].concat()).code
    };
    let found = |together: &str| match together {
        "channels and a transport with one connection" => send(&[], [at[0], "fd:0"]),
        "a level without its method" => send(&["--multifd-zstd-level", "3"], at),
        "`zero-page-detection` multifd and multifd off" => {
            send(&["--multifd-channels", "0", "--zero-page-detection", "multifd"], at)
        }
        "`tls-hostname` without `tls-creds`" => send(&["--tls-hostname", "x"], at),
        "`tls-authz` without `tls-creds`" => receive(&["--tls-authz", "CN=x"]),
        "`mapped-ram` and compressed channels" => receive(&["--multifd-compression", "zstd"]),
        "`mapped-ram` and TLS" => receive(&["--tls-creds", "x"]),
        "multifd and `xbzrle`" => send(&["--xbzrle"], at),
        "multifd and `postcopy-ram`" => send(&["--postcopy-ram", "--multifd-channels", "4"], at),
        "`zero-copy-send` and compression" => {
            send(&["--zero-copy-send", "--multifd-compression", "zlib"], at)
        }
        "`zero-copy-send` and TLS" => {
            send(&["--zero-copy-send", "--tls-creds", "x", "--tls-hostname", "x"], at)
        }
        "`max-cpu-throttle` below `cpu-throttle-initial`" => {
            run(["demo", "--cpu-throttle-initial=50", "--max-cpu-throttle=49"]).code
        }
        "a method of `multifd-compression` without multifd" => {
            send(&["--multifd-channels", "0", "--multifd-compression", "zstd"], at)
        }
        "`zero-copy-send` without multifd" => send(&["--multifd-channels", "0", "--zero-copy-send"], at),
        _ => panic!("nothing tries {together:?}"),
    };
    let rows = rows("## Combinations");
    assert_eq!(rows.len(), 14, "{rows:?}");
    for row in rows {
        // If the values are accepted, it fails because there is no file.
        let expected = if row[3] == "taken" { 1 } else { 2 };
        assert_eq!(found(&row[0]), Some(expected), "{row:?}");
    }
}
