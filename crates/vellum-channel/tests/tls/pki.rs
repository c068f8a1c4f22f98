//! Certificates of every kind, good and bad, made on the spot.

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams,
    SerialNumber, date_time_ymd,
};
use vellum_channel::{Pem, TlsIdentity};

/// An issuer.
pub struct Ca {
    pub issuer: CertifiedIssuer<'static, KeyPair>,
    /// The issuers between this one and the trust anchor, this one first.
    between: String,
}

/// A holder: certificate with chain, and key.
#[derive(Clone)]
pub struct Holder {
    pub chain: String,
    pub key: String,
    pub own: String,
}

impl Holder {
    pub fn identity(&self) -> TlsIdentity {
        TlsIdentity::new(Pem::text(self.chain.clone()), Pem::text(self.key.clone()))
    }
}

fn ca_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn key() -> KeyPair {
    KeyPair::generate().unwrap()
}

/// A trust anchor.
pub fn ca(name: &str) -> Ca {
    ca_with(name, |_| ())
}

/// A trust anchor with something changed.
pub fn ca_with(name: &str, change: impl FnOnce(&mut CertificateParams)) -> Ca {
    let mut params = ca_params(name);
    change(&mut params);
    Ca { issuer: CertifiedIssuer::self_signed(params, key()).unwrap(), between: String::new() }
}

impl Ca {
    pub fn pem(&self) -> Pem {
        Pem::text(self.issuer.pem())
    }

    /// An issuer that this one vouches for.
    pub fn issuer_below(&self, name: &str, change: impl FnOnce(&mut CertificateParams)) -> Ca {
        let mut params = ca_params(name);
        params.use_authority_key_identifier_extension = true;
        change(&mut params);
        let issuer = CertifiedIssuer::signed_by(params, key(), &self.issuer).unwrap();
        let between = format!("{}{}", issuer.pem(), self.between);
        Ca { issuer, between }
    }

    /// A holder that this one vouches for.
    pub fn holder(&self, change: impl FnOnce(&mut CertificateParams)) -> Holder {
        let mut params = CertificateParams::default();
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        change(&mut params);
        let key = key();
        let own = params.signed_by(&key, &self.issuer).unwrap().pem();
        Holder { chain: format!("{own}{}", self.between), key: key.serialize_pem(), own }
    }

    /// A list that says the certificates with these numbers are revoked.
    pub fn revocation_list(&self, revoked: &[u64], next_year: i32) -> Pem {
        let revoked_certs = revoked.iter().map(|&number| RevokedCertParams {
            serial_number: SerialNumber::from(number),
            revocation_time: date_time_ymd(2020, 1, 1),
            reason_code: None,
            invalidity_date: None,
        });
        let params = CertificateRevocationListParams {
            this_update: date_time_ymd(2020, 1, 1),
            next_update: date_time_ymd(next_year, 1, 1),
            crl_number: SerialNumber::from(1u64),
            issuing_distribution_point: None,
            revoked_certs: revoked_certs.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        Pem::text(params.signed_by(&self.issuer).unwrap().pem().unwrap())
    }
}

/// A good server, `server.test`, 127.0.0.1 and ::1.
pub fn server(params: &mut CertificateParams) {
    let names = ["server.test".to_owned(), "127.0.0.1".to_owned(), "::1".to_owned()];
    params.subject_alt_names = CertificateParams::new(names).unwrap().subject_alt_names;
    params.distinguished_name = subject("the server");
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
}

/// A good client, `C=UK,CN=qemu.client`.
pub fn client(params: &mut CertificateParams) {
    let names = ["client.test".to_owned()];
    params.subject_alt_names = CertificateParams::new(names).unwrap().subject_alt_names;
    params.distinguished_name = subject("qemu.client");
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
}

pub fn subject(common_name: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CountryName, "UK");
    name.push(DnType::CommonName, common_name);
    name
}

pub fn expired(params: &mut CertificateParams) {
    params.not_before = date_time_ymd(2019, 1, 1);
    params.not_after = date_time_ymd(2020, 1, 1);
}

pub fn not_yet_valid(params: &mut CertificateParams) {
    params.not_before = date_time_ymd(3000, 1, 1);
    params.not_after = date_time_ymd(3001, 1, 1);
}
