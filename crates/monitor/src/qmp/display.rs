//! Screens, keyboards, pointers.

use super::{Command, Empty, Error, Result, command};
use crate::Context;
use display::input::{Button, Event, Key};
use display::{PictureFormat, write_picture};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::time::Duration;

pub(super) const COMMANDS: &[Command] = &[
    command!("screendump", screendump),
    command!("send-key", send_key),
    command!("input-send-event", input_send_event),
    command!("query-vnc", query_vnc),
    command!("set_password", set_password),
    command!("change-vnc-password", change_password),
];

#[derive(Clone, Copy, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum ImageFormat {
    #[default]
    Ppm,
    Png,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct ScreenDump {
    filename: String,
    /// Id of the display device; the first if not given.
    device: Option<String>,
    head: Option<u32>,
    #[serde(default)]
    format: ImageFormat,
}

fn screendump(c: &Context, a: ScreenDump) -> Result<Empty> {
    let displays = c.machine(|m| m.displays().clone())?;
    let consoles = displays.consoles();
    let console = match &a.device {
        None => consoles.get(a.head.unwrap_or(0) as usize),
        Some(id) => consoles.iter().find(|c| c.name() == id),
    };
    let console = match (console, &a.device) {
        (Some(console), _) => console,
        (None, Some(id)) => return Err(Error::no_device(id)),
        (None, None) => return Err(Error::generic("There is no console to take a screendump from")),
    };
    console.refresh();
    let frame = console.capture().ok_or_else(|| Error::generic("no surface"))?;
    let format = match a.format {
        ImageFormat::Ppm => PictureFormat::Ppm,
        ImageFormat::Png => PictureFormat::Png,
    };
    write_picture(&frame, format, a.filename.as_ref())
        .map_err(|e| Error::generic(format!("failed to open file '{}': {e}", a.filename)))?;
    Ok(Empty {})
}

/// A key, by name or by scan code.
#[derive(Clone, Deserialize, Serialize, JsonSchema)]
#[serde(tag = "type", content = "data", rename_all = "lowercase")]
enum KeyValue {
    /// Scan code of set 1, bit 7 for the prefix 0xe0.
    Number(u32),
    /// QEMU's name.
    Qcode(String),
}

fn key(value: &KeyValue) -> Result<Key> {
    match value {
        KeyValue::Number(n) => {
            let key = u8::try_from(*n).ok().and_then(Key::from_set1);
            key.ok_or_else(|| Error::generic(format!("there is no key with the scan code {n:#x}")))
        }
        KeyValue::Qcode(name) => Key::from_name(name)
            .ok_or_else(|| Error::generic(format!("Parameter 'keys' does not accept value '{name}'"))),
    }
}

#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct SendKey {
    keys: Vec<KeyValue>,
    /// Milliseconds until the keys are released.
    hold_time: Option<u64>,
}

/// Longest time that keys are held.
const LONGEST: u64 = 60_000;

fn send_key(c: &Context, a: SendKey) -> Result<Empty> {
    let keys = a.keys.iter().map(key).collect::<Result<Vec<_>>>()?;
    let input = c.machine(|m| m.displays().input().clone())?;
    let hold = Duration::from_millis(a.hold_time.unwrap_or(100).min(LONGEST));
    input.send(&keys.iter().map(|k| Event::Key(*k, true)).collect::<Vec<_>>());
    let up: Vec<_> = keys.iter().rev().map(|k| Event::Key(*k, false)).collect();
    std::thread::Builder::new()
        .name("keys".into())
        .stack_size(64 << 10)
        .spawn(move || {
            std::thread::sleep(hold);
            input.send(&up);
        })
        .map_err(|e| Error::generic(format!("cannot start a thread: {e}")))?;
    Ok(Empty {})
}

#[derive(Clone, Copy, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum InputButton {
    Left,
    Middle,
    Right,
    WheelUp,
    WheelDown,
    Side,
    Extra,
    WheelLeft,
    WheelRight,
}

#[derive(Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Axis {
    X,
    Y,
}

/// Something a person does.
#[derive(Deserialize, JsonSchema)]
#[serde(tag = "type", content = "data", rename_all = "lowercase")]
enum InputEvent {
    Key { key: KeyValue, down: bool },
    Btn { button: InputButton, down: bool },
    Rel { axis: Axis, value: i32 },
    Abs { axis: Axis, value: u32 },
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct SendEvent {
    #[serde(rename = "device")]
    _device: Option<String>,
    #[serde(rename = "head")]
    _head: Option<u32>,
    events: Vec<InputEvent>,
}

fn input_send_event(c: &Context, a: SendEvent) -> Result<Empty> {
    let displays = c.machine(|m| m.displays().clone())?;
    let mut all = Vec::new();
    let mut position: (Option<u32>, Option<u32>) = (None, None);
    for event in &a.events {
        match event {
            InputEvent::Key { key: k, down } => all.push(Event::Key(key(k)?, *down)),
            InputEvent::Rel { axis: Axis::X, value } => all.push(Event::Move(*value, 0)),
            InputEvent::Rel { axis: Axis::Y, value } => all.push(Event::Move(0, *value)),
            InputEvent::Abs { axis: Axis::X, value } => position.0 = Some(*value),
            InputEvent::Abs { axis: Axis::Y, value } => position.1 = Some(*value),
            InputEvent::Btn { button, down } => {
                let wheel = |x, y| down.then_some(Event::Wheel(x, y));
                let press = |b| Some(Event::Button(b, *down));
                all.extend(match button {
                    InputButton::Left => press(Button::Left),
                    InputButton::Middle => press(Button::Middle),
                    InputButton::Right => press(Button::Right),
                    InputButton::Side => press(Button::Side),
                    InputButton::Extra => press(Button::Extra),
                    InputButton::WheelUp => wheel(0, 1),
                    InputButton::WheelDown => wheel(0, -1),
                    InputButton::WheelLeft => wheel(-1, 0),
                    InputButton::WheelRight => wheel(1, 0),
                });
            }
        }
    }
    if let (Some(x), Some(y)) = position {
        const RANGE: u32 = 0x8000;
        all.insert(0, Event::Position { at: (x.min(RANGE - 1), y.min(RANGE - 1)), size: (RANGE, RANGE) });
    }
    displays.input().send(&all);
    Ok(Empty {})
}

/// The VNC server.
#[derive(Serialize, JsonSchema)]
struct VncInfo {
    enabled: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    host: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    service: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    family: Option<&'static str>,
}

fn query_vnc(c: &Context, _: Empty) -> Result<VncInfo> {
    let vnc = crate::context::lock(&c.vnc);
    let Some(server) = vnc.as_ref() else {
        return Ok(VncInfo { enabled: false, host: None, service: None, family: None });
    };
    let address = server.address();
    let (host, service, family) = match address.rsplit_once(':') {
        Some(("unix", path)) => (path, "", "unix"),
        Some((host, port)) => (host, port, if host.contains(':') { "ipv6" } else { "ipv4" }),
        None => (address, "", "unix"),
    };
    Ok(VncInfo {
        enabled: true,
        host: Some(host.trim_matches(['[', ']']).into()),
        service: Some(service.into()),
        family: Some(family),
    })
}

fn change(c: &Context, password: String) -> Result<Empty> {
    match crate::context::lock(&c.vnc).as_ref() {
        Some(server) => {
            server.set_password((!password.is_empty()).then_some(password));
            Ok(Empty {})
        }
        None => Err(Error::generic("Could not set password: there is no VNC server")),
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Protocol {
    Vnc,
    Spice,
}

#[derive(Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Connected {
    Fail,
    Disconnect,
    Keep,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct SetPassword {
    protocol: Protocol,
    password: String,
    connected: Option<Connected>,
}

fn set_password(c: &Context, a: SetPassword) -> Result<Empty> {
    if a.protocol == Protocol::Spice {
        return Err(Error::of(super::Class::DeviceNotActive, "SPICE is not in use"));
    }
    if a.connected.is_some_and(|w| w != Connected::Keep) {
        // As QEMU has it for VNC.
        return Err(Error::generic("Parameter 'connected' must be 'keep' when 'protocol' is 'vnc'"));
    }
    change(c, a.password)
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct NewPassword {
    password: String,
}

fn change_password(c: &Context, a: NewPassword) -> Result<Empty> {
    change(c, a.password)
}
