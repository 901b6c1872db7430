//! "Did you mean ...?"

/// The name among `known` nearest to `given`, if it is near enough to be a likely slip.
pub fn nearest<'a>(given: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let lower = given.to_ascii_lowercase();
    known
        .into_iter()
        .map(|name| (strsim::damerau_levenshtein(&lower, &name.to_ascii_lowercase()), name))
        .filter(|(distance, name)| *distance <= 1 + given.len().max(name.len()) / 3)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slips_are_recognised_and_nonsense_is_not() {
        let known = ["virtio-blk-pci", "virtio-rng-pci", "isa-serial"];
        assert_eq!(nearest("virtio-blkpci", known), Some("virtio-blk-pci"));
        assert_eq!(nearest("VIRTIO-RNG", known), Some("virtio-rng-pci"));
        assert_eq!(nearest("zzz", known), None);
    }
}
