//! `null`: output is discarded, there is no input.

use crate::Kind;
use base::props::Properties;
use bus::NullChardev;
use schemars::JsonSchema;
use serde::Deserialize;
use std::sync::Arc;

#[derive(Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
struct Spec {}

pub(crate) const KIND: Kind = Kind {
    name: "null",
    about: "Discards output",
    properties: Properties::of::<Spec>,
    open: |bag| {
        bag.spec::<Spec>()?;
        Ok(Arc::new(NullChardev))
    },
};
