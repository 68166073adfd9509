package conformance

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// authority signs the certificates of a test.
type authority struct {
	t    testing.TB
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	a := &authority{t: t, key: newKey(t)}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "a test's authority"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	var err error
	if a.cert, err = x509.ParseCertificate(a.sign(template, template, a.key)); err != nil {
		t.Fatal(err)
	}
	return a
}

func (a *authority) sign(template, parent *x509.Certificate, key *ecdsa.PrivateKey) []byte {
	a.t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	return der
}

// write writes a PEM file.
func (a *authority) write(path, kind string, der []byte) {
	a.t.Helper()
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		a.t.Fatal(err)
	}
}

// issue makes a directory with the authority's certificate, and a certificate and a key for each of sides ("server",
// "client"), named as NBD programs look for them.
func (a *authority) issue(serial int64, sides ...string) (dir string) {
	a.t.Helper()
	dir = a.t.TempDir()
	a.write(filepath.Join(dir, "ca-cert.pem"), "CERTIFICATE", a.cert.Raw)
	for _, side := range sides {
		key := newKey(a.t)
		template := &x509.Certificate{
			SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: side},
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
			KeyUsage:    x509.KeyUsageDigitalSignature,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
			DNSNames:    []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		}
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			a.t.Fatal(err)
		}
		a.write(filepath.Join(dir, side+"-cert.pem"), "CERTIFICATE", a.sign(template, a.cert, key))
		a.write(filepath.Join(dir, side+"-key.pem"), "PRIVATE KEY", der)
	}
	return dir
}

// revoke makes the list of revoked certificates in dir.
func (a *authority) revoke(dir string, serial int64) {
	a.t.Helper()
	list := &x509.RevocationList{
		Number: big.NewInt(1), ThisUpdate: time.Now().Add(-time.Hour), NextUpdate: time.Now().Add(time.Hour),
		RevokedCertificateEntries: []x509.RevocationListEntry{
			{SerialNumber: big.NewInt(serial), RevocationTime: time.Now().Add(-time.Minute)},
		},
	}
	der, err := x509.CreateRevocationList(rand.Reader, list, a.cert, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	a.write(filepath.Join(dir, "ca-crl.pem"), "X509 CRL", der)
}

// secure is an export's URI with TLS, by the certificates in dir.
func (d *daemon) secure(export, dir string) string {
	return "nbds+unix:///" + export + "?socket=" + d.socket + "&tls-certificates=" + dir + "&tls-verify-peer=false"
}

// TestTLS serves with certificates: clients with TLS are served, those without are not.
func TestTLS(t *testing.T) {
	t.Parallel()
	need(t, "nbdinfo", "nbdcopy", "qemu-img")
	a := newAuthority(t)
	certificates, stranger := a.issue(2, "server"), newAuthority(t).issue(2)
	d := startDaemon(t, "--tls-certificates", certificates, "--nbd", "tcp:127.0.0.1:0")
	const size = 6 * mib
	image, other := randomImage(t, size, 15), randomImage(t, size, 16)
	d.do("attach", "vm", emptyImage(t, size))
	uris := d.status("vm").URIs
	const tcp = "nbds://127.0.0.1:"
	if len(uris) != 2 || !strings.HasPrefix(uris[0], "nbds+unix:///vm?") || !strings.HasPrefix(uris[1], tcp) {
		t.Errorf("URIs %q", uris)
	}
	client := a.issue(0)
	remote := uris[1] + "?tls-certificates=" + client // its certificate is checked
	tool(t, "nbdinfo", "--is", "tls", remote)
	tool(t, "nbdcopy", "--connections=4", image, d.secure("vm", client))
	d.do("snapshot", "vm@a", "--chunk", "8k")
	tool(t, "nbdcopy", "--connections=4", "--request-size=1048576", other, remote)
	tool(t, "cmp", image, fetch(t, d.secure("vm@a", client), "--connections=4"))
	tool(t, "cmp", other, fetch(t, remote))

	address := strings.TrimSuffix(strings.TrimPrefix(uris[1], tcp), "/vm")
	qemu := func(export, dir string) []string {
		return []string{"compare", "--object", "tls-creds-x509,id=tls0,endpoint=client,dir=" + dir, "--image-opts",
			"driver=raw,file.driver=nbd,file.host=127.0.0.1,file.port=" + address + ",file.export=" + export +
				",file.tls-creds=tls0"}
	}
	tool(t, "qemu-img", append(qemu("vm@a", client), "driver=raw,file.driver=file,file.filename="+image)...)
	tool(t, "qemu-img", append(qemu("vm", client), "driver=raw,file.driver=file,file.filename="+other)...)
	// Its certificate is of an authority that the client does not know: that is the client's to refuse.
	toolFails(t, "nbdinfo", uris[1]+"?tls-certificates="+stranger)

	for _, uri := range []string{d.uri("vm"), "nbd://127.0.0.1:" + address + "/vm"} {
		if out := toolFails(t, "nbdinfo", "--size", uri); !strings.Contains(out, "TLS") {
			t.Errorf("a client without TLS: %s", out)
		}
	}
	toolFails(t, "nbdinfo", "--list", d.uri(""))
}

// TestTLSAllowed lets the client decide.
func TestTLSAllowed(t *testing.T) {
	t.Parallel()
	need(t, "nbdinfo")
	a := newAuthority(t)
	d := startDaemon(t, "--tls-certificates", a.issue(2, "server"), "--tls", "allow")
	d.do("attach", "vm", "mem:1M")
	tool(t, "nbdinfo", "--is", "tls", d.secure("vm", a.issue(0)))
	tool(t, "nbdinfo", d.uri("vm"))
	toolFails(t, "nbdinfo", "--is", "tls", d.uri("vm"))
}

// TestTLSClientCertificates wants certificates of clients too: a revoked one, another authority's and none are refused.
func TestTLSClientCertificates(t *testing.T) {
	t.Parallel()
	need(t, "nbdinfo", "nbdcopy")
	a := newAuthority(t)
	certificates := a.issue(2, "server")
	a.revoke(certificates, 4)
	d := startDaemon(t, "--tls-certificates", certificates, "--tls-verify-peer")
	image := randomImage(t, 2*mib, 17)
	d.do("attach", "vm", image)
	d.do("snapshot", "vm@a")
	good := a.issue(3, "client")
	tool(t, "cmp", image, fetch(t, d.secure("vm@a", good), "--connections=2"))
	for what, dir := range map[string]string{
		"no certificate": a.issue(0),
		"a revoked one":  a.issue(4, "client"),
		"a stranger's":   newAuthority(t).issue(3, "client"),
	} {
		if r := runProgram(t, nil, "nbdinfo", "--size", d.secure("vm@a", dir)); r.status == 0 {
			t.Errorf("%s was served", what)
		}
	}
	tool(t, "nbdinfo", d.secure("vm", good)) // the others have done no harm
}
