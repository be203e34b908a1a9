//! The state of devices as fields, for people and for programs.
//!
//! A field is decoded when it is printed: an array of millions of elements needs no memory, and people see its beginning.

use std::fmt::Write as _;

use qemu_stream::state::{Array, DeviceState, Devices, Field, Fields, Value};
use serde::{Serialize, Serializer, ser::SerializeStruct};

use crate::{
    args::InspectArgs,
    output::{
        outcome::{Failure, While},
        outlet::{print_json, print_lines},
    },
    stored::Opened,
};

/// Prints the devices that were asked for.
pub(super) fn run(args: &InspectArgs, file: &Opened) -> Result<(), Failure> {
    let devices = Devices::of(file.devices()).map_err(|error| args.file.unreadable(error))?;
    let wanted: Vec<_> = match &args.device {
        None => devices.iter().collect(),
        Some(name) => {
            let found: Vec<_> = devices.iter().filter(|device| is_named(device, name)).collect();
            if found.is_empty() {
                let names: Vec<_> = devices.iter().map(|device| device.to_string()).collect();
                let why = format!("expected one of {}, found {name:?}", names.join(", "));
                return Err(While::new(format!("no such device in {}", args.file), why).into());
            }
            found
        }
    };
    if args.json {
        return Ok(print_json(&wanted.iter().map(Shown).collect::<Vec<_>>())?);
    }
    for device in wanted {
        let (version, bytes) = (device.version(), device.bytes().len());
        print_lines(&[format!("{device}  version {version}, {bytes} bytes")])?;
        for field in device.fields() {
            let mut lines = Vec::new();
            field_lines(&field, 1, &mut lines);
            print_lines(&lines)?;
        }
    }
    Ok(())
}

/// Whether a device is called `NAME`, or `NAME:INSTANCE`.
fn is_named(device: &DeviceState<'_>, wanted: &str) -> bool {
    let name = device.name().to_string();
    let instance = |text: &str| {
        let hexadecimal = text.strip_prefix("0x").map(|digits| u32::from_str_radix(digits, 16));
        hexadecimal.unwrap_or_else(|| text.parse()).ok()
    };
    wanted == name
        || wanted
            .rsplit_once(':')
            .is_some_and(|(of, number)| of == name && instance(number) == Some(device.instance()))
}

/// The name of a field, with its number if there are several.
pub(in crate::verbs) fn name_of(field: &Field<'_>) -> String {
    match field.index() {
        Some(index) => format!("{}[{index}]", field.name()),
        None => field.name().to_owned(),
    }
}

fn field_lines(field: &Field<'_>, depth: usize, lines: &mut Vec<String>) {
    let indent = "  ".repeat(depth);
    let (name, kind) = (name_of(field), field.kind());
    match field.value() {
        Value::Struct(fields) => {
            lines.push(format!("{indent}{name}  {kind}"));
            all_lines(fields, depth + 1, lines);
        }
        Value::Array(array) if matches!(array.get(0), Some(Value::Struct(_))) => {
            lines.push(format!("{indent}{name}  {kind}[{}]", array.len()));
            for (number, element) in array.iter().enumerate().take(ELEMENTS) {
                lines.push(format!("{indent}  [{number}]"));
                if let Value::Struct(fields) = element {
                    all_lines(fields, depth + 2, lines);
                }
            }
            lines.extend(rest(array.len(), ELEMENTS).map(|rest| format!("{indent}  {rest}")));
        }
        Value::Array(array) => {
            lines.push(format!("{indent}{name}  {kind}[{}]  {}", array.len(), array_text(&array)));
        }
        value => lines.push(format!("{indent}{name}  {kind}  {}", scalar(&value))),
    }
}

fn all_lines(fields: Fields<'_>, depth: usize, lines: &mut Vec<String>) {
    fields.for_each(|field| field_lines(&field, depth, lines));
}

fn array_text(array: &Array<'_>) -> String {
    let shown: Vec<_> = array.iter().take(NUMBERS).map(|value| scalar(&value)).collect();
    let rest = rest(array.len(), NUMBERS).map(|rest| format!(" {rest}"));
    format!("{}{}", shown.join(" "), rest.unwrap_or_default())
}

/// A value that has no parts.
pub(in crate::verbs) fn scalar(value: &Value<'_>) -> String {
    match value {
        Value::Unsigned(number) => format!("{number:#x}"),
        Value::Signed(number) => number.to_string(),
        Value::Bool(value) => value.to_string(),
        Value::Bytes(bytes) => {
            let shown = hex(bytes.get(..BYTES).unwrap_or(bytes));
            rest(bytes.len(), BYTES).map_or(shown.clone(), |rest| format!("{shown} {rest}"))
        }
        Value::Struct(_) => "{…}".to_owned(),
        Value::Array(array) => array_text(array),
        _ => "?".to_owned(),
    }
}

fn rest(all: usize, shown: usize) -> Option<String> {
    let rest = all.checked_sub(shown).filter(|rest| *rest > 0)?;
    Some(format!("… {rest} more; --json has all"))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// A part of a device as JSON.
struct Shown<'a, T>(&'a T);

impl Serialize for Shown<'_, DeviceState<'_>> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut out = serializer.serialize_struct("device", 4)?;
        out.serialize_field("name", &self.0.name().to_string())?;
        out.serialize_field("instance-id", &self.0.instance())?;
        out.serialize_field("version", &self.0.version())?;
        out.serialize_field("fields", &Shown(&self.0.fields()))?;
        out.end()
    }
}

impl Serialize for Shown<'_, Fields<'_>> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.map(OwnedField))
    }
}

/// A field as JSON.
struct OwnedField<'a>(Field<'a>);

impl Serialize for OwnedField<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut out = serializer.serialize_struct("field", 4)?;
        out.serialize_field("name", self.0.name())?;
        if let Some(index) = self.0.index() {
            out.serialize_field("index", &index)?;
        }
        out.serialize_field("type", self.0.kind())?;
        out.serialize_field("value", &OwnedValue(self.0.value()))?;
        out.end()
    }
}

/// A value as JSON: bytes are hexadecimal digits.
struct OwnedValue<'a>(Value<'a>);

impl Serialize for OwnedValue<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match &self.0 {
            Value::Unsigned(number) => serializer.serialize_u64(*number),
            Value::Signed(number) => serializer.serialize_i64(*number),
            Value::Bool(value) => serializer.serialize_bool(*value),
            Value::Bytes(bytes) => serializer.serialize_str(&hex(bytes)),
            Value::Struct(fields) => Shown(fields).serialize(serializer),
            Value::Array(array) => serializer.collect_seq(array.iter().map(OwnedValue)),
            _ => serializer.serialize_unit(),
        }
    }
}

/// What people see of an array of numbers, of an array of structs, and of bytes.
const NUMBERS: usize = 32;
const ELEMENTS: usize = 64;
const BYTES: usize = 64;
